"pytest runs the notebooks too: each one is a test that executes all its cells."
import os, sys
from contextlib import contextmanager
from pathlib import Path

import pytest

root = Path(__file__).parent
needs = {'to_onnx': dict(torch='2.6', onnx=None, onnxscript=None, onnxruntime=None), 'quantise': dict(torch='2.8', torchao=None)} # what a tutorial needs besides the requirements, with the oldest version


def pytest_collect_file(file_path, parent):
    if file_path.suffix == '.ipynb' and '.ipynb_checkpoints' not in file_path.parts: return Notebook.from_parent(parent, path=file_path)


class Notebook(pytest.File):
    "A notebook"
    def collect(self): yield Run.from_parent(self, name='run')


@contextmanager
def taken_back():
    "A notebook's `@patch` gives the library's classes functions that are the notebook's own: the tests that follow are of the library's"
    import fasterai.misc.all
    classes = {c for name, m in [*sys.modules.items()] if name.startswith('fasterai.') for c in vars(m).values() if isinstance(c, type) and c.__module__.startswith('fasterai.')}
    before = {c: dict(vars(c)) for c in classes}
    try: yield
    finally:
        for c, attrs in before.items():
            for name, o in attrs.items():
                if vars(c).get(name) is not o: setattr(c, name, o)


class Run(pytest.Item):
    "One run of all cells"
    def runtest(self):
        from nbdev.test import test_nb
        for name, version in needs.get(self.path.stem, {}).items(): pytest.importorskip(name, minversion=version)
        before = os.getcwd()
        os.chdir(self.path.parent)
        try:
            with taken_back(): ok, _ = test_nb(self.path, profile=False)
        finally: os.chdir(before)
        if not ok: raise NotebookError(f'{self.path.relative_to(root)} failed; its traceback is in the captured output')

    def repr_failure(self, excinfo): return str(excinfo.value) if excinfo.errisinstance(NotebookError) else super().repr_failure(excinfo)
    def reportinfo(self): return self.path, 0, str(self.path.relative_to(root))


class NotebookError(Exception): pass
