"""What each switch of `BN_Folder` gains over the plain fold: BatchNorms, and time of a forward pass.

    python benchmarks/beyond.py                    # the zoo, with latency (an hour)
    python benchmarks/beyond.py --only densenet
    python benchmarks/beyond.py --seconds 0        # BatchNorms and errors alone

Statistics and γ (of both signs) are random. Errors are relative, in float64, against the original; times are of float32 on the CPU, run in turn, medians of the ratio to the plain fold within a round."""
import argparse
from functools import partial

import torch
from fastprogress import progress_bar
from torch.utils._pytree import tree_map
from torch.utils.benchmark import Timer

import networks as lists
from common import build, cast, load, quartiles, randomise, results, save
from fasterai.fold.verify import aligned, difference, run
from fasterai.misc.bn_folding import BN_Folder
from latency import clocks, interleaved
from peers import attempt

switches = dict(plain={}, through_relu=dict(through_relu=True), reparameterize=dict(reparameterize=True), both=dict(through_relu=True, reparameterize=True))


def fold(model, args, switch):
    "One folded network: how many BatchNorms went, and how far it is from the original"
    bn = BN_Folder(**switches[switch])
    new = bn.fold(model, *args)
    return new, dict(folded=bn.report.folded, total=len(bn.report), notes=len(bn.report.notes), error=difference(run(model, args, {}), run(new, args, {})).relative)


def batch_of(n, t): return t.repeat(n, *[1]*(t.dim()-1)) if t.dim() == 4 else t


def measure(source, name, seconds, clock, batch):
    "Every switch that folds more than the plain fold does"
    model, args = build(source, name)
    model, args = randomise(model).double(), cast(args, torch.float64)
    folded = {s: fold(model, args, s) for s in switches}
    found, nets = {s: r for s, (_, r) in folded.items()}, {s: m.float() for s, (m, r) in folded.items() if s == 'plain' or r['folded'] > folded['plain'][1]['folded']}
    if seconds and len(nets) > 1:
        args = tree_map(partial(batch_of, batch), cast(args, torch.float32))
        timers = {s: Timer('m(*args)', globals=dict(m=m, args=args), num_threads=torch.get_num_threads(), timer=clock) for s, m in nets.items()}
        with torch.no_grad(): times = interleaved(timers, seconds, lambda t: t.timeit(1).median)
        for s in nets: found[s]['time'] = quartiles([a/b for a, b in zip(times[s], times['plain'])])
    return found


def cell(r, plain):
    if r['folded'] == plain['folded']: return '–'
    return f"+{r['folded'] - plain['folded']}" + (' {1:.3f} [{0:.3f} – {2:.3f}]'.format(*r['time']) if 'time' in r else '') + ('' if r['error'] < 1e-9 else ' WRONG')


def table(found):
    "The networks that gain something, then the sums"
    rows = [('', 'plain', *[*switches][1:])]
    good = {name: r for name, r in found.items() if 'plain' in r}
    for name, r in good.items():
        if any(r[s]['folded'] > r['plain']['folded'] for s in switches): rows.append((name, f"{r['plain']['folded']}/{r['plain']['total']}", *(cell(r[s], r['plain']) for s in [*switches][1:])))
    rows.append((f'all {len(good)}', *(f"{sum(r[s]['folded'] for r in good.values())}/{sum(r[s]['total'] for r in good.values())}" for s in switches)))
    wrong = [f'{name} {s}' for name, r in good.items() for s in switches if not r[s]['error'] < 1e-9]
    return '\n'.join([aligned(rows), f"wrong: {', '.join(wrong) or 'none'}", *(f"{name}: {r.get('crashed') or r.get('absent')}" for name, r in found.items() if name not in good)])


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--only', default='', help='networks whose name contains this')
    p.add_argument('--seconds', type=float, default=4, help='how long to time one network for; 0 to leave it')
    p.add_argument('--clock', choices=clocks, default='wall', help='cpu: time of this process, all threads together')
    p.add_argument('--batch', type=int, default=8, help='images at a time, where latency is measured')
    p.add_argument('--again', action='store_true', help='measure what was measured before, too')
    p.add_argument('--out', default=str(results/'beyond.json'))
    a = p.parse_args()
    zoo, found = [n for n in lists.zoo() if a.only in n['name']], load(a.out)
    keys = [f"{n['source']}/{n['name']}" for n in zoo]
    for key, n in progress_bar([(k, n) for k, n in zip(keys, zoo) if a.again or k not in found]):
        found[key] = attempt(measure, n['source'], n['name'], a.seconds, clocks[a.clock], a.batch)
        save(a.out, settings=dict(clock=a.clock, batch=a.batch), networks=found)
    print(table({k: found[k] for k in keys}))


if __name__ == '__main__': main()
