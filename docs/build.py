"Builds the site: notebooks, hand-written pages and results are staged as Markdown in `_proc`, and Sphinx makes `_docs` of them."
import re, shutil, sys
from pathlib import Path

from sphinx.cmd.build import main as sphinx

import results
from convert import convert, page_name, prose
from fastcore.nbio import read_nb

docs = Path(__file__).parent
root = docs.parent
nbs, stage, site = root/'nbs', root/'_proc', root/'_docs'


def toctree(caption, entries): return '\n'.join(['```{toctree}', ':hidden:', f':caption: {caption}', '', *entries, '```'])


def api(notebooks):
    "The page that lists the modules"
    rows = []
    for p in notebooks:
        title, promise = re.match(r'# (.*?)\n+> (.*)', read_nb(p).cells[0].source).groups()
        rows.append(f'| [`fasterai.{page_name(p)}`]({page_name(p)}.md) | **{title}** · {promise} |')
    tree = ['```{toctree}', ':hidden:', '', *(f'{page_name(p)} <{page_name(p)}>' for p in notebooks), '```']
    return '\n'.join(['# API', '', 'A page a module, in the order in which they build on each other; `from fasterai.misc.all import *` brings all that a user needs.', '',
                      '| module | what it holds |', '|---|---|', *rows, '', *tree]) + '\n'


def pages():
    "Everything that Sphinx reads"
    shutil.rmtree(stage, ignore_errors=True)
    (images := stage/'images').mkdir(parents=True)
    modules = sorted(nbs.glob('[0-9]*.ipynb'))
    for p in sorted(nbs.rglob('*.ipynb')):
        if '.ipynb_checkpoints' in p.parts: continue
        print(p.relative_to(root), flush=True)
        convert(p, stage/p.parent.relative_to(nbs), images)
    for p in sorted((docs/'pages').glob('*.md')):
        text = re.sub(r'^\{\{ (\w+) \}\}$', lambda m: getattr(results, m[1])(), p.read_text(), flags=re.M)
        (stage/p.name).write_text(prose(text.replace('](../../nbs/', '](')))
    for name in ('CONTRIBUTING', 'CHANGELOG'): (stage/f'{name.lower()}.md').write_text(prose((root/f'{name}.md').read_text()))
    for p in docs.glob('*.svg'): shutil.copy(p, stage)
    (stage/'api.md').write_text(api(modules))
    names = lambda folder: [p.relative_to(stage).with_suffix('').as_posix() for p in sorted((stage/folder).glob('*.md'))]
    with (stage/'index.md').open('a') as f:
        f.write('\n\n'.join([toctree('Learn', [*names('explained'), *names('tutorials')]), toctree('Measured', ['what_folds', 'benchmarks']),
                             toctree('Reference', ['limits', 'api']), toctree('Project', ['contributing', 'changelog'])]))


pages()
shutil.rmtree(site, ignore_errors=True)
sys.exit(sphinx(['-W', '--keep-going', '-q', '-j', 'auto', '-c', str(docs), '-d', str(stage/'.doctrees'), str(stage), str(site)]))
