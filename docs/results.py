"Tables and plots of `benchmarks/results/*.json`, as raw HTML; what was not measured yet is said, not shown."
import io, json, re
from html import escape
from pathlib import Path

import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt
from convert import folded, html

folder = Path(__file__).parent.parent/'benchmarks'/'results'
ink = '#010203' # stands for the page's own text colour
plt.rcParams |= {k: ink for k in ('text.color', 'axes.edgecolor', 'axes.labelcolor', 'xtick.color', 'ytick.color')} | {
    'svg.fonttype': 'none', 'svg.hashsalt': 'fasterai', 'font.family': 'sans-serif', 'axes.spines.top': False, 'axes.spines.right': False}


def load(name):
    file = folder/f'{name}.json'
    return json.loads(file.read_text()) if file.exists() else None


def missing(name): return f':::{{note}}\n`benchmarks/results/{name}.json` is not there yet: run `make bench`.\n:::'


def where(name, data):
    "What the numbers were made with"
    return html(f'<p>{escape(", ".join(f"{k} {v}" for k,v in data["environment"].items()))}; <code>benchmarks/results/{name}.json</code></p>')


def table(heads, rows, **kw):
    "An HTML table; numbers stand right"
    cell = lambda tag, o: f'<{tag}{" class=number" if isinstance(o, (int, float)) else ""}>{o if isinstance(o, str) else f"{o:,}" if isinstance(o, int) else f"{o:.3g}"}</{tag}>'
    body = '\n'.join(f'<tr>{"".join(cell("td", o) for o in r)}</tr>' for r in rows)
    head = ''.join(f'<th>{o}</th>' for o in heads)
    return f'<div class="output"><table{"".join(f" {k}={v!r}" for k,v in kw.items())}><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def svg(fig):
    "A figure that takes the page's colours, light or dark"
    with io.StringIO() as f:
        fig.savefig(f, format='svg', transparent=True, bbox_inches='tight', metadata={'Date': None})
        text = f.getvalue()
    plt.close(fig)
    return html(f'<div class="output plot">{text[text.index("<svg"):].replace(ink, "currentColor")}</div>')


def general(why): return re.sub('`[^`]*`', '`…`', why)
def code(text): return re.sub('`([^`]*)`', r'<code>\1</code>', escape(text, quote=False))


def coverage_files(): return sorted(folder.glob('coverage*.json'))


def networks():
    "The coverage benchmarks, a row a network that ran: name, with an example, without"
    found = {k: v for file in coverage_files() for k,v in json.loads(file.read_text())['networks'].items()}
    return [(k, v['with'], v['without']) for k,v in sorted(found.items()) if 'with' in v]


def coverage_totals():
    if not (rows := networks()): return missing('coverage')
    done = [(w, o) for _,w,o in rows if 'folded' in w and 'folded' in o]
    total = sum(w['total'] for w,_ in done)
    line = lambda kind, i: (kind, sum(r[i]['folded'] for r in done), total, f"{sum(r[i]['folded'] for r in done)/total:.1%}", max(r[i]['error'] for r in done), sum(r[i]['wrong'] for r in done))
    return html(table(['fold', 'BatchNorms folded', 'of', 'share', 'largest relative difference, float64', 'networks with another output'],
                      [line('with an example', 0), line('without', 1)])) + ''.join(f'\n\n{where(f.stem, load(f.stem))}' for f in coverage_files())


def coverage_table():
    if not (rows := networks()): return missing('coverage')
    def row(name, w, o):
        if 'crashed' in w or 'crashed' in o: return name, '', '', '', '', escape(w.get('crashed') or o['crashed'])
        kept = ''.join(f'<li>{n} × {code(why)}</li>' for why,n in w['kept'])
        shown = f'<details><summary>{w["total"]-w["folded"]} kept</summary><ul>{kept}</ul></details>' if kept else 'all folded' if w['folded'] == w['total'] else f'{w["total"]-w["folded"]} kept'
        return name, w['total'], w['folded'], o['folded'], w['error'], shown
    return html(filters + table(['network', 'BatchNorms', 'folded with an example', 'without', 'relative difference', 'the rest, and why'], [row(*r) for r in rows], id='zoo') + script)


filters = '''<div class="filter"><input type="search" id="find" placeholder="a network, or a word of a reason" aria-label="Filter the networks">
<label><input type="checkbox" id="kept"> only where something is kept</label><span id="count" role="status"></span></div>'''
script = '''<script>
{ const rows = [...document.querySelectorAll('#zoo tbody tr')], [find, kept, count] = ['find', 'kept', 'count'].map(o => document.getElementById(o));
  function show() {
    const words = find.value.toLowerCase().split(/\\s+/);
    for (const r of rows) r.hidden = !words.every(w => r.textContent.toLowerCase().includes(w)) || kept.checked && !r.querySelector('details');
    count.textContent = `${rows.filter(r => !r.hidden).length} of ${rows.length} networks`;
  }
  find.oninput = kept.onchange = show; show(); }
</script>'''


def coverage_plot():
    "How much of each network is folded"
    if not (rows := networks()): return missing('coverage')
    share = lambda i: sorted((100*r[i]['folded']/r[i]['total'] for r in rows if 'folded' in r[i]), reverse=True)
    fig,ax = plt.subplots(figsize=(7, 3))
    for i,label,style in ((1, 'with an example', '-'), (2, 'without', '--')): ax.plot(range(1, len(share(i))+1), share(i), style, label=label, lw=2)
    ax.set(xlabel='networks, sorted', ylabel='BatchNorms folded (%)', ylim=(0, 103))
    ax.legend(frameon=False)
    return svg(fig)


def error_plot():
    "How far apart the outputs are"
    if not (rows := networks()): return missing('coverage')
    errors = [r[i]['error'] for r in rows for i in (1, 2) if r[i].get('error')]
    fig,ax = plt.subplots(figsize=(7, 2.5))
    ax.hist(errors, bins=[10**(e/2) for e in range(-34, -17)])
    ax.axvline(1e-9, color='C3', ls='--', label='what counts as wrong')
    ax.set(xscale='log', xlabel='relative difference of the outputs, float64', ylabel='folds')
    ax.legend(frameon=False)
    return svg(fig)


def reasons():
    "The reasons, counted over the networks"
    if not (rows := networks()): return missing('coverage')
    counts = {}
    for _,w,_ in rows:
        for why,n in w.get('kept', ()): counts[general(why)] = counts.get(general(why), 0) + n
    return html(table(['BatchNorms', 'why it is kept'], [(n, code(why)) for why,n in sorted(counts.items(), key=lambda o: -o[1])]))


def leaves(tree, *path):
    "The numbers and words in a tree, each with the way to it"
    for k,v in tree.items():
        if isinstance(v, dict): yield from leaves(v, *path, k)
        else: yield ' · '.join(map(str, (*path, k))), v


def records(tree, *path):
    "The dicts in a tree that hold something themselves, each with the way to it"
    if any(not isinstance(v, dict) for v in tree.values()): yield path, dict(leaves(tree))
    else:
        for k,v in tree.items(): yield from records(v, *path, k)


def value(v):
    "A value in a table; three numbers are quartiles"
    if isinstance(v, list): return f'{v[1]:.3g} ({v[0]:.3g} – {v[2]:.3g})' if len(v) == 3 and all(isinstance(o, float) for o in v) else code(str(v))
    return {True: 'yes', False: 'no'}[v] if isinstance(v, bool) else v if isinstance(v, (int, float)) else code(str(v))


def numbers(found):
    "All numbers: a row a record where the records are alike, else a row a number"
    rows = list(records(found))
    columns = list(dict.fromkeys(k for _,r in rows for k in r))
    if len(rows) < 2 or len(columns) > 14: return table(['what', 'value'], [(code(k), value(v)) for k,v in leaves(found)])
    return table(['', *columns], [(code(' · '.join(p)), *(value(r.get(k, '')) for k in columns)) for p,r in rows])


def bars(title, group):
    "A few numbers of one kind"
    fig,ax = plt.subplots(figsize=(7, .6 + .3*len(group)))
    ax.bar_label(ax.barh(list(group), list(group.values())), fmt=lambda v: f' {v:,.0f}' if v >= 1000 else f' {v:.3g}')
    ax.set_title(title, loc='left')
    ax.invert_yaxis()
    ax.xaxis.set_visible(False)
    ax.spines['bottom'].set_visible(False)
    return svg(fig)


def cost(found):
    "The groups of numbers that belong together"
    for name,group in found.items():
        for k,v in group.items():
            if isinstance(v, dict): yield bars(f'{name}: {k}', v)
        if not any(isinstance(v, dict) for v in group.values()): yield bars(name, group)


def dots(series, label, log=False):
    "Values by name, with a range where there is one: `{series: {name: (low, middle, high)}}`"
    names = list(dict.fromkeys(n for o in series.values() for n in o))
    fig,ax = plt.subplots(figsize=(7, .8 + .24*len(names)))
    for i,(title,points) in enumerate(series.items()):
        low,mid,high = zip(*points.values())
        ax.errorbar(mid, [names.index(n) + .16*(i - (len(series)-1)/2) for n in points], xerr=[[m-l for l,m in zip(low, mid)], [h-m for h,m in zip(high, mid)]], fmt='o', ms=4, lw=1, label=title)
    ax.set(xlabel=label, xscale='log' if log else 'linear')
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.legend(frameon=False, loc='lower center', bbox_to_anchor=(.5, 1), ncols=len(series))
    return svg(fig)


def latency(found):
    "How fast, against the unfolded network"
    ratios = list(dict.fromkeys(k for v in found['networks'].values() for k in v if k.endswith('/ unfolded')))
    yield dots({k.split(' / ')[0]: {n: v[k] for n,v in found['networks'].items() if k in v} for k in ratios}, 'time / time of the unfolded network, median and quartiles')


def numerics(found):
    "How precise, against float64"
    kinds = list(dict.fromkeys(k for v in found['networks'].values() for k in v))
    yield dots({k: {n: [v[k]['rms']]*3 for n,v in found['networks'].items() if k in v} for k in kinds}, 'error against float64, root mean square', log=True)


def peers(found):
    "What other tools make of the same networks"
    sums = {}
    for tools in found['networks'].values():
        for tool,r in tools.items():
            o = sums.setdefault(tool, [0]*4)
            o[0 if r.get('right') else 1 if 'right' in r else 2] += 1
            if r.get('right'): o[3] += r['removed']
    yield bars('BatchNorms removed in networks whose outputs stay the same', {k: v[3] for k,v in sums.items()})
    yield html(table(['', 'networks right', 'wrong', 'failed or not run', 'BatchNorms removed where right'], [(code(k), *v) for k,v in sums.items()]))


def beyond(found):
    "What each switch gains over the plain fold"
    nets = {n.split('/')[-1]: r for n,r in found['networks'].items() if 'plain' in r}
    switches = list(dict.fromkeys(s for r in nets.values() for s in r))
    for kind in ('BatchNorms', 'scales', 'layers'): yield bars(f'{kind} that go, in {len(nets)} networks', {s: n for s in switches if (n := sum(r[s]['gone'][kind.lower()] for r in nets.values()))})
    yield dots({s: t for s in switches if s != 'plain' and (t := {n: r[s]['time'] for n,r in nets.items() if 'time' in r[s]})}, 'time / time of the plain fold, median and quartiles')


drawn = {'beyond': beyond, 'cost': cost, 'latency': latency, 'latency-compiled': latency, 'numerics': numerics, 'peers': peers}


def others():
    "Every result but the coverage: drawn, if it is known how, and all its numbers"
    for file in sorted(folder.glob('*.json')):
        if file.stem.startswith('coverage'): continue
        data = json.loads(file.read_text())
        found = {k: v for k,v in data.items() if k not in ('environment', 'settings')}
        pictures = drawn[file.stem](found) if file.stem in drawn else ()
        yield '\n\n'.join([f'### {file.stem}', *pictures, folded('All numbers', html(numbers(found))), where(file.stem, data)])


def measured(): return '\n\n'.join(others()) or missing('cost')
