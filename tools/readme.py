"Renders `nbs/index.ipynb` to README.md: markdown as it is, code in fences, saved outputs below it. `--check` only compares."
import re, sys
from pathlib import Path

from fastcore.nbio import read_nb

root = Path(__file__).parent.parent


def outputs(cell):
    "What the cell printed or gave, as text"
    for o in cell.get('outputs', []):
        if o.get('name') == 'stderr': continue
        text = o.get('text') or o.get('data', {}).get('text/plain', '')
        yield ''.join(text)


def render(nb):
    for cell in nb.cells:
        source = cell.source.strip()
        if '#| hide' in source: continue
        if cell.cell_type == 'markdown': yield re.sub(r'\]\((?=[\w.]+[\w/.]*\.ipynb)', '](nbs/', source).replace('](../', '](')
        elif cell.cell_type == 'code':
            yield f"```python\n{source}\n```"
            text = ''.join(outputs(cell)).rstrip()
            if text: yield f"```\n{text}\n```"


text = '\n\n'.join(render(read_nb(root/'nbs'/'index.ipynb'))) + '\n'
readme = root/'README.md'
if '--check' in sys.argv: sys.exit(None if readme.read_text() == text else 'README.md is not what nbs/index.ipynb renders to: run `make export`')
readme.write_text(text)
