"The project itself: one source for each fact, rooms in order, a light import."
import ast, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

import pytest
try: import tomllib
except ImportError: import tomli as tomllib
from fastcore.nbio import read_nb

root = Path(__file__).parent.parent
notebooks = sorted(root.glob('nbs/[0-9]*.ipynb'))


def module_of(nb): return 'fasterai.' + nb.stem.split('_', 1)[1]


def test_settings_and_pyproject_agree():
    cfg = ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini')
    cfg, toml = cfg['DEFAULT'], tomllib.loads((root/'pyproject.toml').read_text())
    import fasterai
    assert toml['project']['name'] == cfg['lib_name'] and toml['project']['description'] == cfg['description']
    assert toml['tool']['nbdev']['git_url'] == cfg['git_url'] and toml['tool']['nbdev']['branch'] == cfg['branch']
    assert fasterai.__version__ == cfg['version']
    assert 'version' in toml['project']['dynamic'] and 'dependencies' in toml['project']['dynamic']


@pytest.mark.parametrize('nb', notebooks, ids=lambda p: p.stem)
def test_a_notebook_imports_only_lower_numbers(nb):
    number = {module_of(p): int(p.stem[:2]) for p in notebooks}
    for cell in read_nb(nb).cells:
        if cell.cell_type != 'code' or '#| export' not in cell.source: continue
        for node in ast.walk(ast.parse(cell.source)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for name in (n for n in names if n and n.startswith('fasterai.')): assert number[name] < int(nb.stem[:2]), f'{nb.stem} imports {name}'


@pytest.mark.parametrize('nb', [p for p in notebooks if int(p.stem[:2]) < 20], ids=lambda p: p.stem)
def test_only_the_learner_room_imports_fastai(nb):
    code = f"import sys, {module_of(nb)}; sys.exit('fastai' in sys.modules or 'matplotlib' in sys.modules or 'pandas' in sys.modules)"
    subprocess.run([sys.executable, '-c', code], check=True)


def test_modules_stay_small():
    for nb in notebooks:
        lines = [l for l in (root/(module_of(nb).replace('.', '/') + '.py')).read_text().splitlines() if l.strip() and not l.strip().startswith('#')]
        assert len(lines) < 330, f'{nb.stem} exports {len(lines)} lines'


def test_readme_is_the_index(): subprocess.run([sys.executable, root/'tools'/'readme.py', '--check'], check=True)
