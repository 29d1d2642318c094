"Notebooks as Markdown pages: their text, their code, what it printed, and the API of what they export."
import ast, base64, inspect, os, re
from importlib import import_module

import torch
from fastcore.docments import DocmentTbl, docments
from fastcore.nbio import read_nb
from nbdev.doclinks import NbdevLookup
from nbdev.showdoc import showdoc_nm

lookup = NbdevLookup(strip_libs=('fasterai', 'fastai'))
moved = {'README': 'index', 'benchmarks/README': 'benchmarks', 'CHANGELOG': 'changelog', 'CONTRIBUTING': 'contributing'}
torch_docs = 'https://docs.pytorch.org/docs/stable/generated/'
torch_places = {'nn': torch.nn, 'nn.functional': torch.nn.functional}


def page_name(path): return re.sub(r'^\d+_', '', path.stem)
def block(text, kind='', **options):
    "A fenced block that no fence inside can close"
    head = [f':{k}: {v}' for k,v in options.items()] + ['']*bool(options)
    return '\n'.join(['``````' + kind, *head, text.rstrip('\n'), '``````'])
def html(text): return block(text, '{raw} html')
def folded(title, text): return '\n\n'.join([html(f'<details><summary>{title}</summary>'), text, html('</details>')])


def label(page, name): return f'{page}-{name.removeprefix(page + ".").lower()}' + ('-class' if name.split('.')[-1][0].isupper() else '') # labels have no case


def url_of(name):
    "Where `name` is documented: here, at PyTorch, at fastai; `None` where nowhere"
    if name.rpartition('.')[2].startswith('_'): return None
    found = lookup.doc(name)
    if found and not found.startswith('http'): return '#' + label(found[1:found.index('.html#')], name.removeprefix('fasterai.'))
    path, _, last = re.sub(r'^(torch\.)?(?=nn\.)|^F\.', lambda m: '' if m[0] != 'F.' else 'nn.functional.', name).rpartition('.')
    if path == 'torch' and callable(getattr(torch, last, None)) and last in torch.__all__: return f'{torch_docs}{name}.html'
    if not path and isinstance(getattr(torch.nn, last, None), type): path = 'nn'
    if path in torch_places and hasattr(torch_places[path], last): return f'{torch_docs}torch.{path}.{last}.html'
    return found if name[0].isupper() or path else None # fastai has functions named like common words


def linked(text):
    "`text` with a link on each name in backticks that is documented, outside of fences and of links"
    def link(m):
        url = m[1] and url_of(m[1].removesuffix('()'))
        return f'[`{m[1]}`]({url})' if url else m[0]
    return re.sub(r'^```.*?^```|\[[^]\n]*\]\(|`([\w.]+(?:\(\))?)`', link, text, flags=re.M | re.S)


def prose(text):
    "Markdown of a notebook as Markdown of the site"
    text = re.sub(r':::\s*\{\.callout-(\w+)\}(.*?):::', lambda m: f':::{{{m[1]}}}{m[2]}:::', text, flags=re.S)
    text = re.sub(r'\]\(([\w./]*?)(?:\d+_)?([\w.]+)\.ipynb(#[^)]*)?\)', r'](\1\2.md\3)', text)
    text = re.sub(rf'\]\((?:\.\./)+({"|".join(moved)})\.md', lambda m: f'](/{moved[m[1]]}.md', text)
    return linked(re.sub(r'\]\((?:\.\./)+docs/(?:pages/)?', '](/', text))


def plain(text): return re.sub(r"<class '(?:\w+\.)*(\w+)'>|fasterai\.[\w.]*\.(?=[A-Z])", lambda m: m[1] or '', text).replace('<factory>', '...') # what Python shows in angle brackets


def signature(sym, name):
    "How `sym` is called; what its arguments are stands in the table below"
    sig = inspect.signature(sym)
    bare = [p.replace(annotation=p.empty) for p in sig.parameters.values() if p.name != 'self']
    return plain(f'{name}{sig.replace(parameters=bare, return_annotation=sig.empty)}')


def symbol(module, name, page, level):
    "The documentation of one function, class or method"
    sym = eval(name, vars(module))
    params = DocmentTbl(sym)
    for k,v in docments(sym, full=True, args_kwargs=True).items():
        if v.docment and k in params.dm: params.dm[k].docment = v.docment # of `**kwargs`, too
    what = '' if inspect.isclass(sym) and issubclass(sym, Exception) else block(signature(sym, name), '{code-block} python', **{'class': 'signature'})
    return '\n\n'.join([f'({label(page, name)})=\n{"#"*level} {name}', what, linked(inspect.getdoc(sym) or ''), linked(plain(str(params)))])


def exported(cell, module, page, level):
    "What an exported cell defines, then its source"
    for node in ast.parse(cell.source).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith('_'): continue
        yield symbol(module, name := showdoc_nm(node), page, level)
        for m in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(m, ast.FunctionDef) and not m.decorator_list and not m.name.startswith('_') and ast.get_docstring(m): yield symbol(module, f'{name}.{m.name}', page, level+1)
    yield folded('Source', block(cell.source, 'python'))


def shown(text):
    "What a terminal shows of `text` in the end: no colours, and of a progress bar the last state"
    lines = (next((o for o in reversed(l.split('\r')) if o.strip()), '') for l in re.sub(r'\x1b\[[\d;]*[A-Za-z]', '', text).split('\n'))
    return '\n'.join(l.rstrip() for l in lines)


def outputs(cell, images, stem):
    "What the cell showed when it was last run"
    for i,o in enumerate(cell.get('outputs', [])):
        data = {k: ''.join(v) for k,v in o.get('data', {'text/plain': o.get('text', '')}).items()}
        if o.get('name') == 'stderr': continue
        for kind in ('text/html', 'image/svg+xml'):
            if kind in data: yield html(f'<div class="output">{data[kind]}</div>'); break
        else:
            if 'image/png' in data:
                (images/(name := f'{stem}-{i}.png')).write_bytes(png := base64.b64decode(data['image/png']))
                yield block('', f'{{image}} /images/{name}', alt=cell.alt, width=f'{int.from_bytes(png[16:20], "big")//2}px') # drawn with two pixels for one
            elif 'text/markdown' in data: yield prose(data['text/markdown'])
            elif text := shown(data['text/plain']).strip('\n'): yield block(text, '{code-block} none', **{'class': 'output'})


def pieces(path, images):
    "The page of one notebook, piece by piece"
    page,module,level = page_name(path),None,1
    for i,cell in enumerate(read_nb(path).cells):
        says = dict(re.findall(r'^#\|\s*([\w-]+)\s*:?\s*(.*)$', cell.source, flags=re.M))
        cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
        cell.alt = says.get('fig-alt', says.get('fig-cap', ''))
        if 'default_exp' in says: module = import_module(f'fasterai.{says["default_exp"]}')
        if 'hide' in says or not cell.source: continue
        if cell.cell_type == 'markdown':
            level = len(([level*'#'] + re.findall(r'^(#+) ', cell.source, flags=re.M))[-1])
            yield prose(cell.source)
        elif 'export' in says: yield from exported(cell, module, page, level+1)
        else:
            code = block(cell.source, 'python')
            if says.get('echo') != 'false': yield folded('Code', code) if says.get('code-fold') == 'true' else code
            if says.get('output') != 'false': yield from outputs(cell, images, f'{page}-{i}')


def convert(path, out, images):
    "Write the page of the notebook at `path` to the folder `out`"
    head,*rest = pieces(path, images)
    out.mkdir(exist_ok=True)
    title,_,promise = head.partition('\n')
    about = f'{{download}}`{path.name} <{os.path.relpath(path, out)}>`'
    (out/f'{page_name(path)}.md').write_text('\n\n'.join([title, promise.strip(), f'This page is a notebook: {about}.' , *rest]) + '\n')
