"""How far a network is from the exact result in each float type: unfolded, folded by us, and fused by `torch.nn.utils.fusion.fuse_conv_bn_eval`.

    python benchmarks/numerics.py                     # every network and type, then subnormal weights
    python benchmarks/numerics.py --only resnet18

The exact result is that of the network as it was trained, in float32, computed in float64; then it is cast to the type, and folded. Goals: the folded network's error is at most 1.2 times
the unfolded one's, and at most 1.05 times the peer's. Beside them: a network that is folded before it is cast (its weights are rounded once), and a harder measure, against the network with
its weights as the type stores them (where the unfolded one has no weight rounded at all)."""
import argparse, copy

import torch
from fastprogress import progress_bar
from torch import nn
from torch.utils.benchmark import Timer

from common import build, load, quartiles, randomise, results, save
from fasterai.fold.affine import Affine
from fasterai.fold.layers import absorb
from fasterai.fold.verify import aligned
from fasterai.misc.bn_folding import BN_Folder
from latency import clocks, interleaved
from peers import attempt, siblings

networks = [('torchvision', n) for n in ('resnet18', 'vgg11_bn', 'mobilenet_v2', 'efficientnet_b0', 'densenet121', 'regnet_y_400mf', 'shufflenet_v2_x0_5', 'resnet50')]
dtypes = dict(float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)


def errors(outs, truth):
    "Root mean square and largest error, each relative to the exact result's"
    apart = outs.double() - truth
    return dict(rms=(apart.norm()/truth.norm()).item(), largest=(apart.abs().max()/truth.abs().max()).item())


def measure(source, name, dtype, seeds, batch=4):
    "All errors, over several random statistics and inputs together"
    outs = {k: [] for k in ('truth', 'stored', 'unfolded', 'folded', 'peer', 'folded, then cast')}
    for seed in range(seeds):
        model, (x,) = build(source, name)
        model, x = randomise(model, seed), torch.randn(batch, *x.shape[1:], generator=torch.Generator().manual_seed(seed))
        cast, y = copy.deepcopy(model).to(dtype), x.to(dtype)
        nets = {'unfolded': cast, 'folded': BN_Folder().fold(cast), 'peer': siblings(cast, (y,)), 'folded, then cast': BN_Folder().fold(model).to(dtype)}
        with torch.no_grad():
            for k, m in nets.items(): outs[k].append(m(y).flatten())
            outs['truth'].append(model.double()(x.double()).flatten())
            outs['stored'].append(cast.double()(y.double()).flatten())
    outs = {k: torch.cat(v) for k, v in outs.items()}
    return {k: errors(o, outs['truth']) | dict(stored=errors(o, outs['stored'])['rms']) for k, o in outs.items() if k not in ('truth', 'stored')}


def judged(r):
    "The ratios that have goals"
    return {f'{kind}: folded / {other}': r['folded'][kind]/r[other][kind] for kind in ('rms', 'largest') for other in ('unfolded', 'peer')}


def subnormal(seconds, clock, channels=64, dtype=torch.float32):
    "A convolution whose folded weights are subnormal, stored as they are and flushed to zero: time, against one with ordinary weights"
    torch.manual_seed(0)
    w, x, zeros, scale = torch.randn(channels, channels, 3, 3, dtype=dtype), torch.randn(1, channels, 28, 28, dtype=dtype), torch.zeros(channels), torch.finfo(dtype).tiny/100
    stored = dict(ordinary=w, subnormal=(w.double()*scale).to(dtype), flushed=absorb('conv2d', w, None, after=Affine(torch.full((channels,), scale).double(), zeros.double()))[0])
    timers = {n: Timer('conv2d(x, w, padding=1)', globals=dict(conv2d=nn.functional.conv2d, x=x, w=w), num_threads=torch.get_num_threads(), timer=clock) for n, w in stored.items()}
    times = interleaved(timers, seconds, lambda t: t.timeit(5).median)
    return {f'{n} / ordinary': quartiles([a/b for a, b in zip(times[n], times['ordinary'])]) for n in ('subnormal', 'flushed')} | dict(rounds=len(times['flushed']))


def table(found):
    "A line a network and type, then how many reach the goals"
    columns = [f'{kind}: folded / {other}' for kind in ('rms', 'largest') for other in ('unfolded', 'peer')]
    besides = {'folded, then cast / unfolded': lambda r: r['folded, then cast']['rms']/r['unfolded']['rms'], 'as stored: folded / unfolded': lambda r: r['folded']['stored']/r['unfolded']['stored']}
    rows = [('', 'unfolded rms', 'folded rms', 'peer rms', *columns, *besides)]
    for name, r in found.items():
        rows.append((name, r['crashed'], *['']*8) if 'crashed' in r else
                    (name, *(f"{r[k]['rms']:.2e}" for k in ('unfolded', 'folded', 'peer')), *(f'{judged(r)[c]:.3f}' for c in columns), *(f'{f(r):.3f}' for f in besides.values())))
    yield aligned(rows)
    ratios = {name: judged(r) for name, r in found.items() if 'crashed' not in r}
    yield ''
    for c, goal in zip(columns, (1.2, 1.05)*2):
        over = {name: r[c] for name, r in ratios.items() if not r[c] <= goal}
        yield f"{c}, at most {goal}: {len(ratios) - len(over)} of {len(ratios)}{'; not ' if over else ''}{', '.join(f'{n} ({v:.2f})' for n, v in over.items())}"


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--only', default='', help='lines whose name contains this')
    p.add_argument('--seeds', type=int, default=4, help='random statistics and inputs, four images each')
    p.add_argument('--seconds', type=float, default=5, help='how long to time the subnormal weights for')
    p.add_argument('--threads', type=int, help='threads of PyTorch')
    p.add_argument('--clock', choices=clocks, default='wall', help='cpu: time of this process, all threads together')
    p.add_argument('--again', action='store_true', help='measure what was measured before, too')
    p.add_argument('--out', default=str(results/'numerics.json'))
    a = p.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    found = load(a.out)
    lines = [(s, n, d) for s, n in networks for d in dtypes if a.only in (key := f'{n} {d}') and (a.again or key not in found)]
    tiny = subnormal(a.seconds, clocks[a.clock])
    for source, name, dtype in progress_bar(lines):
        found[f'{name} {dtype}'] = attempt(measure, source, name, dtypes[dtype], a.seeds)
        save(a.out, settings=dict(seeds=a.seeds, clock=a.clock), networks=found, subnormal=tiny)
    print('\n'.join(table({k: r for k, r in found.items() if a.only in k})))
    print('\nA convolution with subnormal weights, time against one with ordinary weights, median [quartiles]')
    for n in ('subnormal', 'flushed'): print('{1:8.2f}x [{0:.2f} – {2:.2f}]  {3}'.format(*tiny[f'{n} / ordinary'], dict(subnormal='as they are', flushed='flushed to zero, as a fold does')[n]))


if __name__ == '__main__': main()
