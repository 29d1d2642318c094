"pytest runs the notebooks too: each one is a test that executes all its cells."
import os
from pathlib import Path

import pytest

root = Path(__file__).parent
needs = {'to_onnx': dict(torch='2.6', onnx=None, onnxscript=None, onnxruntime=None), 'quantise': dict(torch='2.8', torchao=None)} # what a tutorial needs besides the requirements, with the oldest version


def pytest_collect_file(file_path, parent):
    if file_path.suffix == '.ipynb' and '.ipynb_checkpoints' not in file_path.parts: return Notebook.from_parent(parent, path=file_path)


class Notebook(pytest.File):
    "A notebook"
    def collect(self): yield Run.from_parent(self, name='run')


class Run(pytest.Item):
    "One run of all cells"
    def runtest(self):
        from nbdev.test import test_nb
        for name, version in needs.get(self.path.stem, {}).items(): pytest.importorskip(name, minversion=version)
        before = os.getcwd()
        os.chdir(self.path.parent)
        try: ok, _ = test_nb(self.path, profile=False)
        finally: os.chdir(before)
        if not ok: raise NotebookError(f'{self.path.relative_to(root)} failed; its traceback is in the captured output')

    def repr_failure(self, excinfo): return str(excinfo.value) if excinfo.errisinstance(NotebookError) else super().repr_failure(excinfo)
    def reportinfo(self): return self.path, 0, str(self.path.relative_to(root))


class NotebookError(Exception): pass
