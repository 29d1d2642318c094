"The site: every reason is explained, every link leads somewhere, and a browser shows every page as it should."
import ast, re, shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

root = Path(__file__).parent.parent
site = root/'_docs'
pages = sorted(p for p in site.rglob('*.html')) if site.exists() else []
built = pytest.mark.skipif(not pages, reason='the site is not built: run `make docs`')


# ------------------------------------------------------------------ reasons

def template(node):
    "A string in the code as a reader meets it: `…` for what is filled in, without backticks"
    parts = [node] if isinstance(node, ast.Constant) else node.values
    return re.sub('…+', '…', ''.join(v.value if isinstance(v, ast.Constant) else '…' for v in parts).replace('`', '')).strip()


def strings(node):
    "The outermost strings under `node`"
    if isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and isinstance(node.value, str): yield template(node)
    else:
        for o in ast.iter_child_nodes(node): yield from strings(o)


def said(tree):
    "What a module may tell its user: in an error, as a reason, as the name of a reader"
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc and 'AttributeError' not in ast.dump(node.exc): yield from strings(node.exc)
        elif isinstance(node, ast.Return) and node.value: yield from strings(node.value)
        elif isinstance(node, ast.Assign) and re.search('outside|why|strided|source', ast.unparse(node.targets[0])): yield from strings(node.value)


def reasons():
    for file in sorted((root/'fasterai').rglob('*.py')):
        if file.stem in ('_modidx', 'report', 'learner'): continue
        for text in said(ast.parse(file.read_text())):
            if re.search(r"[a-z]{2,} ([a-z]|…)|… [a-z]{2,}|…'s ", text): yield text


def test_every_reason_is_explained_and_no_other():
    explained = set(re.findall('``(.*?)``', (root/'docs'/'pages'/'limits.md').read_text()))
    assert not (missing := set(reasons()) - explained), 'docs/pages/limits.md does not explain:\n' + '\n'.join(sorted(missing))
    assert not (stale := explained - set(reasons())), 'nothing says:\n' + '\n'.join(sorted(stale))
