"""What a fold costs, as multiples of one deepcopy and one forward pass measured in the same run, in turn.

    python benchmarks/cost.py"""
import argparse, copy, json, resource, statistics, sys, time

import torch
from fastprogress import progress_bar
from torch import nn
from torchvision.models import resnet50

from common import give_back, randomise, results, save
from fasterai.misc.bn_folding import BN_Folder


def interleaved(rounds, **jobs):
    "Median seconds of each job, run in turn, each with memory that it touches for the first time, as in a new process; else chance decides which of them finds some that was used before"
    times = {name: [] for name in jobs}
    for _ in progress_bar(range(rounds)):
        for name, job in jobs.items():
            give_back()
            start = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def on_resnet50(rounds):
    "`fold` against `deepcopy` and `forward`"
    model, x = randomise(resnet50()), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        t = interleaved(rounds, deepcopy=lambda: copy.deepcopy(model), forward=lambda: model(x), fold=lambda: BN_Folder().fold(model), fold_x=lambda: BN_Folder().fold(model, x))
    return {'fold / deepcopy (at most 2)': t['fold']/t['deepcopy'], 'fold with an example / (deepcopy + 4 forwards) (at most 1)': t['fold_x']/(t['deepcopy'] + 4*t['forward']), 'seconds': t}


def chain(n, width=8): return randomise(nn.Sequential(*[l for _ in range(n) for l in (nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU())]))


def with_depth(rounds, short=100, long=3000):
    "Cost a BatchNorm, at two depths"
    small, large, x = chain(short), chain(long), torch.randn(1, 8, 2, 2)
    t = interleaved(rounds, small=lambda: [BN_Folder().fold(small) for _ in range(long//short)], large=lambda: BN_Folder().fold(large),
                    small_x=lambda: [BN_Folder().fold(small, x) for _ in range(long//short)], large_x=lambda: BN_Folder().fold(large, x))
    return {f'a BatchNorm at {long} blocks / at {short} (at most 1.5)': t['large']/t['small'], 'the same with an example': t['large_x']/t['small_x'], 'seconds': t}


def with_width(rounds, widths=(16, 256, 1024), blocks=20):
    "`fold` against `deepcopy`, from a network that is all layers to one that is all weights"
    nets = {w: chain(blocks, w) for w in widths}
    t = interleaved(rounds, **{f'{job} {w}': lambda f=f, m=m: f(m) for w, m in nets.items() for job, f in (('deepcopy', copy.deepcopy), ('fold', lambda m: BN_Folder().fold(m)))})
    return {f'fold / deepcopy at {w} channels': t[f'fold {w}']/t[f'deepcopy {w}'] for w in widths} | dict(seconds=t)


def peak(job):
    "Peak extra memory of `job` in a process of its own, in bytes"
    import subprocess
    out = subprocess.run([sys.executable, __file__, '--peak', job], capture_output=True, text=True, check=True).stdout
    return int(out.strip().splitlines()[-1])


def measure_peak(job):
    "Print how far the resident memory rises above what the model itself takes"
    model, x = nn.Sequential(*[l for _ in range(12) for l in (nn.Conv2d(1024, 1024, 3, padding=1, bias=False), nn.BatchNorm2d(1024), nn.ReLU())]).eval(), torch.randn(1, 1024, 2, 2)
    weights = sum(p.numel()*p.element_size() for p in model.parameters())
    run = dict(copy=lambda: copy.deepcopy(model), fold=lambda: BN_Folder().fold(model), inplace=lambda: BN_Folder().fold(model, inplace=True), fold_x=lambda: BN_Folder().fold(model, x))[job]
    BN_Folder().fold(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).eval()) # what is loaded once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kept = run()
    print(int(1000*(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)*1024/weights))
    return kept


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--rounds', type=int, default=9)
    p.add_argument('--peak')
    a = p.parse_args()
    if a.peak: return measure_peak(a.peak)
    found = dict(resnet50=on_resnet50(a.rounds), depth=with_depth(max(3, a.rounds//3)), width=with_width(a.rounds),
                 peak={f'{job}: extra memory / weights': peak(job)/1000 for job in ('copy', 'fold', 'fold_x', 'inplace')})
    save(results/'cost.json', **found)
    print(json.dumps(found, indent=1))


if __name__ == '__main__': main()
