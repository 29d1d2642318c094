"""How fast a network runs unfolded, folded by us, fused by torch.fx, and at the limit: written with no BatchNorm and no Identity at all.

    python benchmarks/latency.py                          # every network, layout, dtype and batch size
    python benchmarks/latency.py --only resnet18 --seconds 10
    python benchmarks/latency.py --compile                # the same under torch.compile
    python benchmarks/latency.py --threads 1 --clock cpu  # on a machine that others use: processor time, not time

The variants are run in turn, round by round, and compared within a round: medians and quartiles of ratios. Absolute times are of that machine and hour."""
import argparse, random, time
from statistics import median

import torch
from fastprogress import progress_bar
from torch.utils.benchmark import Timer

from common import build, load, quartiles, randomise, results, save
from fasterai.fold.verify import aligned, difference
from fasterai.misc.bn_folding import BN_Folder
from limit import identities, without_identities
from peers import attempt, fx

networks = [('torchvision', n) for n in ('resnet18', 'resnet50', 'vgg16_bn', 'mobilenet_v3_large', 'efficientnet_b0', 'densenet121')] + [('timm', n) for n in ('regnetx_002', 'levit_128s')]
layouts = dict(nchw=torch.contiguous_format, channels_last=torch.channels_last)
dtypes = dict(float32=torch.float32, bfloat16=torch.bfloat16)
columns = 'ours / unfolded', 'fx / unfolded', 'limit / unfolded', 'ours / limit'
clocks = dict(wall=time.perf_counter, cpu=time.process_time)


def variants(model, x):
    "The four networks that are timed; the limit must give what ours gives"
    with torch.no_grad():
        ours = BN_Folder().fold(model, x)
        limit = without_identities(ours)
        if difference(ours(x), limit(x)).relative > 1e-6: raise AssertionError('the limit computes something else')
        return dict(unfolded=model, ours=ours, fx=fx(model, (x,)), limit=limit)


def prepare(source, name, size):
    "A network with random statistics, and an input of `size` pixels where it takes any"
    model, (x,) = build(source, name)
    return randomise(model), x if name == 'levit_128s' else x[..., :size, :size] # its attention biases are for one size


def turned(models, x, dtype, layout, batch, device='cpu'):
    "The same networks and input as this line wants them; the networks are changed"
    how = dict(device=device, dtype=dtypes[dtype], memory_format=layouts[layout])
    return {n: m.to(**how) for n, m in models.items()}, x.repeat(batch, 1, 1, 1).to(**how)


def interleaved(jobs, seconds, once):
    "Times of each job, run in turn for about `seconds`, in an order that changes"
    for job in jobs.values(): once(job) # what is only done the first time
    rounds, order, times = max(5, min(200, int(seconds/sum(map(once, jobs.values()))))), list(jobs), {name: [] for name in jobs}
    for _ in range(rounds):
        random.shuffle(order)
        for name in order: times[name].append(once(jobs[name]))
    return times


def ratios(times):
    "Quartiles of the ratios within a round"
    against = lambda a, b: quartiles([x/y for x, y in zip(times[a], times[b])])
    return dict({f'{name} / unfolded': against(name, 'unfolded') for name in times if name != 'unfolded'}, **{'ours / limit': against('ours', 'limit')},
                rounds=len(times['unfolded']), unfolded_seconds=quartiles(times['unfolded']))


def on_cpu(models, x, seconds, clock, compiled=False):
    "Ratios in eager mode, or compiled: each line anew, for this shape (after a few shapes and dtypes of one `forward`, PyTorch stops compiling it)"
    if compiled:
        torch.compiler.reset()
        models = {n: torch.compile(m, dynamic=False) for n, m in models.items()}
    timers = {n: Timer('model(x)', globals=dict(model=m, x=x), num_threads=torch.get_num_threads(), timer=clock) for n, m in models.items()}
    with torch.no_grad(): return ratios(interleaved(timers, seconds, lambda t: t.timeit(1).median))


def on_cuda(models, x, seconds, graphs):
    "Ratios on a GPU, timed with its own events: eager, or captured as CUDA graphs"
    def job(m):
        if not graphs: return lambda: m(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3): m(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph): m(x)
        return graph.replay
    def once(job, repeat=20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeat): job()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)/1e3/repeat
    with torch.no_grad(): return ratios(interleaved({n: job(m) for n, m in models.items()}, seconds/20, once))


def measure(models, x, a, device='cpu'):
    "One line of the table, or two on a GPU"
    more = dict(size=x.shape[-1], identities={n: identities(models[n]) for n in ('ours', 'limit')})
    if device == 'cuda': return dict(eager=on_cuda(models, x, a.seconds, False), graphs=on_cuda(models, x, a.seconds, True), **more)
    return dict(on_cpu(models, x, a.seconds, clocks[a.clock], a.compile), **more)


def table(found):
    "A line a measurement: medians of ratios, quartiles in brackets"
    show = lambda q: f'{q[1]:.3f} [{q[0]:.3f} – {q[2]:.3f}]'
    rows = [('', *columns)]
    for name, r in found.items():
        for kind, s in ((f'{name} {k}'.strip(), s) for k, s in (dict(eager=r['eager'], graphs=r['graphs']) if 'eager' in r else {'': r}).items()):
            rows.append((kind, *(show(s[c]) for c in columns)) if 'crashed' not in s else (kind, s['crashed'], '', '', ''))
    return aligned(rows)


def summary(found):
    "For each network the median over its lines"
    for network in dict.fromkeys(name.split()[0] for name in found):
        lines = [s for name, r in found.items() if name.split()[0] == network for s in ([r['eager'], r['graphs']] if 'eager' in r else [r]) if 'crashed' not in s]
        if lines: yield f'{network:20} ' + '  '.join(f'{c} {median(s[c][1] for s in lines):.3f}' for c in columns)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--only', default='', help='lines whose name contains this')
    p.add_argument('--seconds', type=float, default=3, help='how long to time one line for; at least 5 rounds')
    p.add_argument('--size', type=int, default=128, help='pixels')
    p.add_argument('--threads', type=int, help='threads of PyTorch')
    p.add_argument('--clock', choices=clocks, default='wall', help='cpu: time of this process, all threads together')
    p.add_argument('--compile', action='store_true', help='under torch.compile')
    p.add_argument('--again', action='store_true', help='measure what was measured before, too')
    p.add_argument('--out')
    a = p.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    out, cuda = a.out or results/('latency-compiled.json' if a.compile else 'latency.json'), torch.cuda.is_available() and not a.compile
    settings, found = dict(clock=a.clock, compiled=a.compile, cuda='measured' if cuda else 'skipped: there is no CUDA GPU here' if not torch.cuda.is_available() else 'skipped: compiled'), load(out)
    lines = [(d, l, b, device) for device in ('cpu', *['cuda']*cuda) for d in dtypes for l in layouts for b in (1, 8)]
    for source, name in progress_bar(networks):
        todo = {key: line for line in lines if a.only in (key := ' '.join(map(str, (name, *line)))) and (a.again or key not in found)}
        if not todo: continue
        model, x = prepare(source, name, a.size)
        models = attempt(variants, model, x)
        for key, line in todo.items(): # float32 before bfloat16
            found[key] = models if 'crashed' in models else attempt(lambda: measure(*turned(models, x, *line), a, line[-1]))
            save(out, settings=settings, networks=found)
    print(table({k: r for k, r in found.items() if a.only in k}))
    print('\nmedian over the lines of a network', *summary({k: r for k, r in found.items() if a.only in k}), sep='\n')
    print(f"\nCUDA {settings['cuda']}")


if __name__ == '__main__': main()
