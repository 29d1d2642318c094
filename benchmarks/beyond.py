"""What each switch of `BN_Folder` gains over the plain fold: BatchNorms, scales and layers that go, and time of a forward pass.

    python benchmarks/beyond.py                    # the zoo, with latency (an hour)
    python benchmarks/beyond.py --only densenet
    python benchmarks/beyond.py --seconds 0        # what goes, and errors, alone; a later run adds the times where a switch gains something

Statistics and scales (of both signs) are random. Errors are relative, in float64, against the original; times are of float32 on the CPU, run in turn, medians of the ratio to the plain fold within a round."""
import argparse
from functools import partial

import torch
from fastprogress import progress_bar
from torch.utils._pytree import tree_map
from torch.utils.benchmark import Timer

import networks as lists
from common import build, cast, error_of, give_back, is_norm, limit, load, quartiles, randomise, results, save
from fasterai.fold.verify import aligned
from fasterai.misc.bn_folding import BN_Folder
from latency import clocks, interleaved
from peers import attempt

switches = dict(plain={}, through_relu=dict(through_relu=True), reparameterize=dict(reparameterize=True), scales=dict(scales=True), series=dict(series=True),
                all=dict(through_relu=True, reparameterize=True, scales=True, series=True))


def rescale(model):
    "Random numbers in what scales for each channel and is no BatchNorm: a LayerScale, the last of a LayerNorm"
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for m in model.modules():
            if is_norm(m) or getattr(m, 'weight', None) is not None and m.weight.dim() > 1: continue
            for p in m.parameters(recurse=False):
                if p.dim() == 1: p.uniform_(.5, 1.2, generator=g).mul_(torch.randint(0, 2, p.shape, generator=g)*2-1)
    return model


def fold(model, args, switch):
    "One folded network: how much of it went, and how far it is from the original"
    bn = BN_Folder(**switches[switch])
    new = bn.fold(model, *args)
    counts = dict(batchnorms=sum(not r.steps and not r.is_layer for r in bn.report if r.folded), scales=sum(bool(r.steps) for r in bn.report if r.folded), layers=sum(r.is_layer for r in bn.report))
    return new, dict(gone=counts, kept=bn.report.kept, notes=len(bn.report.notes), error=error_of(model, new, args, bn.report.plan.places))


def batch_of(n, t): return t.repeat(n, *[1]*(t.dim()-1)) if t.dim() == 4 else t


def measure(source, name, seconds, clock, batch):
    "Every switch that folds more than the plain fold does"
    give_back() # what a large one took
    model, args = build(source, name)
    model, args = rescale(randomise(model)).double(), cast(args, torch.float64)
    found, nets = {}, {}
    for s in switches:
        new, found[s] = fold(model, args, s)
        if s == 'plain' or found[s]['gone'] != found['plain']['gone']: nets[s] = new.float() # one network in float64 at a time, beside the original
    del model, new
    if seconds and len(nets) > 1:
        args = tree_map(partial(batch_of, batch), cast(args, torch.float32))
        timers = {s: Timer('m(*args)', globals=dict(m=m, args=args), num_threads=torch.get_num_threads(), timer=clock) for s, m in nets.items()}
        with torch.no_grad(): times = interleaved(timers, seconds, lambda t: t.timeit(1).median)
        for s in nets: found[s]['time'] = quartiles([a/b for a, b in zip(times[s], times['plain'])])
    return found


def more(r, plain):
    "How many more modules of each kind went than in the plain fold"
    return ' '.join(f"+{n} {kind if n > 1 else kind[:-1]}" for kind in r['gone'] if (n := r['gone'][kind] - plain['gone'][kind]))


def cell(r, plain):
    return (more(r, plain) or '–') + (' {1:.3f} [{0:.3f} – {2:.3f}]'.format(*r['time']) if 'time' in r else '') + ('' if r['error'] < limit else ' WRONG')


def table(found):
    "The networks that gain something, then the sums"
    rows = [('', 'plain', *[*switches][1:])]
    good = {name: r for name, r in found.items() if 'plain' in r}
    for name, r in good.items():
        plain = r['plain']
        if any(more(r[s], plain) for s in switches): rows.append((name, f"{plain['gone']['batchnorms']}/{plain['gone']['batchnorms'] + plain['kept']}", *(cell(r[s], plain) for s in [*switches][1:])))
    sums = {s: {kind: sum(r[s]['gone'][kind] for r in good.values()) for kind in ('batchnorms', 'scales', 'layers')} for s in switches}
    rows.append((f'all {len(good)}', *(' '.join(f'{n:,} {kind}' for kind, n in sums[s].items() if n) for s in switches)))
    wrong = [f'{name} {s}' for name, r in good.items() for s in switches if not r[s]['error'] < limit]
    return '\n'.join([aligned(rows), f"wrong: {', '.join(wrong) or 'none'}", *(f"{name}: {r.get('crashed') or r.get('absent')}" for name, r in found.items() if name not in good)])


def done(r, seconds):
    "Is there nothing to add to what was measured of a network?"
    return 'plain' not in r or not seconds or 'time' in r['plain'] or not any(more(r[s], r['plain']) for s in switches)


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
    for key, n in progress_bar([(k, n) for k, n in zip(keys, zoo) if a.again or k not in found or not done(found[k], a.seconds)]):
        found[key] = attempt(measure, n['source'], n['name'], a.seconds, clocks[a.clock], a.batch)
        save(a.out, settings=dict(clock=a.clock, batch=a.batch), networks=found)
    print(table({k: found[k] for k in keys}))


if __name__ == '__main__': main()
