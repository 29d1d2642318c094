"""How many BatchNorms are folded in real networks, and whether a single output changes.

    python benchmarks/coverage.py                         # the zoo
    python benchmarks/coverage.py --only resnet           # a part of it
    python benchmarks/coverage.py --sources pytorchcv     # one network of every pytorchcv family
    python benchmarks/coverage.py --sources torchvision   # all of torchvision's
    python benchmarks/coverage.py --timm-limit 10         # every timm network below 10 million parameters: hours

Each network is built with random weights and statistics in float64, folded with an example and without, and run. Results are kept a network at a time, so
that a stopped run goes on where it was."""
import argparse, time
from collections import Counter

import torch
from fastprogress import progress_bar

import networks as lists
from common import build, cast, error_of, give_back, here, limit, load, randomise, results, save
from fasterai.fold.verify import run
from fasterai.misc.bn_folding import BN_Folder


def try_fold(model, example, args):
    "One fold: how many, how far apart, why the rest was kept"
    bn, start = BN_Folder(), time.perf_counter()
    new = bn.fold(model, *example)
    seconds = time.perf_counter() - start
    error = error_of(model, new, args, bn.report.plan.places)
    return dict(folded=bn.report.folded, total=len(bn.report), error=error, wrong=not error < limit, seconds=round(seconds, 3),
                kept=Counter(r.why for r in bn.report if r.why).most_common(5))


def measure(source, name):
    "One network, with an example and without"
    give_back() # what a large one took
    try:
        model, args = build(source, name)
        model, args = randomise(model).double(), cast(args, torch.float64)
        run(model, args, {})
    except Exception as e: return dict(unrun=f'{type(e).__name__}: {e}'[:300]) # the network itself: a package that is not here, an input that we do not know
    return {kind: attempt(model, example, args) for kind, example in (('with', args), ('without', ()))}


def attempt(*args):
    try: return try_fold(*args)
    except Exception as e: return dict(crashed=f'{type(e).__name__}: {e}'[:300])


def summary(found):
    "A line a network, worst first"
    for name, r in found.items():
        if 'unrun' in r:
            yield f"{name:45} not run: {r['unrun'][:100]}"
            continue
        w, o = r['with'], r['without']
        goal = r.get('goal')
        flag = 'CRASHED' if 'crashed' in w or 'crashed' in o else 'WRONG' if w['wrong'] or o['wrong'] else 'FEWER' if goal is not None and w['folded'] < goal else ''
        yield f"{name:45} {w.get('folded', '-'):>4}/{w.get('total', '-'):<4} goal {goal if goal is not None else '-':>4}  without {o.get('folded', '-'):>4}  error {w.get('error', float('nan')):.0e} {o.get('error', float('nan')):.0e}  {flag} {w.get('crashed', '')}{o.get('crashed', '')}"


def chosen(a):
    "The networks that the arguments ask for, and where their results go"
    sources = a.sources.split(',') if a.sources else [] if a.timm_limit else ['zoo']
    found = [n for s in sources for n in (lists.zoo(a.list) if s == 'zoo' else getattr(lists, s)())] + (lists.timm(a.timm_limit) if a.timm_limit else [])
    return [n for n in found if a.only in n['name']], a.out or results/('coverage.json' if sources == ['zoo'] else f"coverage-{'-'.join(sources + ['timm']*bool(a.timm_limit))}.json")


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--only', default='', help='networks whose name contains this')
    p.add_argument('--again', action='store_true', help='measure what was measured before, too')
    p.add_argument('--list', default=str(here/'zoo.json'), help='a list of networks like zoo.json')
    p.add_argument('--sources', default='', help='zoo (the default), pytorchcv, torchvision, or several with commas')
    p.add_argument('--timm-limit', type=float, help='every timm network below this many million parameters')
    p.add_argument('--out')
    a = p.parse_args()
    networks, out = chosen(a)
    found = load(out)
    for n in progress_bar(networks):
        key = f"{n['source']}/{n['name']}"
        if key in found and not a.again: continue
        save(out, networks=found | {key: dict.fromkeys(('with', 'without'), dict(crashed='the process ended'))}) # what stays if it does
        try: found[key] = dict(measure(n['source'], n['name']), goal=n.get('linear_fold'))
        finally: save(out, networks=found)
    mine = {k: r for k, r in found.items() if a.only in k}
    print('\n'.join(summary(mine)))
    ran = [r for r in mine.values() if 'unrun' not in r]
    done = [r['with'] for r in ran if 'folded' in r['with']]
    print(f"\n{sum(r['folded'] for r in done)} of {sum(r['total'] for r in done)} BatchNorms folded in {len(done)} networks, "
          f"{sum(r['wrong'] for r in done)} wrong; without an example {sum(r['without'].get('folded', 0) for r in ran)}, "
          f"{sum(r['without'].get('wrong', False) for r in ran)} wrong; {len(mine) - len(ran)} networks do not run")


if __name__ == '__main__': main()
