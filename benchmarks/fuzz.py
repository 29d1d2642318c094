"""Thousands of random networks: none may give another output when it is folded, every second one through its ReLUs too, every third one's layers merged, every fifth one's scales folded.

    python benchmarks/fuzz.py --networks 5000"""
import argparse, random, re, sys
from collections import Counter

import torch
from fastprogress import progress_bar

from common import here, limit, randomise, results, save
from fasterai.fold.verify import difference, run
from fasterai.misc.bn_folding import BN_Folder

sys.path.insert(0, str(here.parent/'tests'))
from random_nets import build, outputs, random_network


def try_one(seed, inputs):
    "Fold one random network, without an example and with: a `Counter` of what happened, and its source if it went wrong"
    rng, seen = random.Random(seed), Counter()
    source = random_network(rng.randrange)
    torch.manual_seed(seed)
    model, bn = randomise(build(source), seed).double(), BN_Folder(through_relu=seed % 2 == 1, reparameterize=seed % 3 == 0, series=seed % 3 == 0, scales=seed % 5 == 0)
    want = outputs(model, inputs)
    if want[0] is None: return Counter({'does not run itself': 1}), ''
    seen['runs at another size'] += want[-1] is not None
    for kind, example in (('without an example', ()), ('with an example', inputs[:1])):
        try: new = bn.fold(model, *example)
        except Exception as e: return seen + Counter(crashed=1), f'# {type(e).__name__}: {e}\n{source}'
        seen[f'{kind}: folded'] += bn.report.folded
        seen[f'{kind}: folded through a ReLU'] += sum(bool(r.through) for r in bn.report)
        seen[f'{kind}: scales folded'] += sum(bool(r.steps) and r.folded for r in bn.report)
        seen[f'{kind}: layers merged in series'] += sum(r.joins == 'series' for r in bn.report)
        seen[f'{kind}: layers and BatchNorms merged in parallel'] += sum(r.joins == 'parallel' for r in bn.report)
        seen[f'{kind}: kept'] += bn.report.kept
        if example: seen.update('because ' + re.sub(r'`[^`]*`', '`…`', r.why) for r in bn.report if r.why)
        if not all(w is None or difference(w, run(new, (i.clone(),), {})).relative < limit for w, i in zip(want, inputs)): return seen + Counter(wrong=1), f'# {kind}\n{source}'
    return seen, ''


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--networks', type=int, default=2000)
    p.add_argument('--first', type=int, default=0, help='the first seed')
    a = p.parse_args()
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(n, 4, side, side, dtype=torch.float64, generator=g)*s for n, side, s in ((2, 6, 1), (3, 6, 3), (2, 12, 1))]
    seen, bad = Counter(wrong=0, crashed=0), []
    for seed in progress_bar(range(a.first, a.first + a.networks)):
        found, source = try_one(seed, inputs)
        seen += found
        if source: bad.append((seed, source))
    save(results/'fuzz.json', networks=a.networks, seen=dict(seen.most_common()), bad=bad)
    for seed, source in bad[:5]: print(f'\nseed {seed}\n{source}')
    print(f"\n{a.networks} networks: {len(bad)} wrong or crashed")
    for what, n in seen.most_common(25): print(f'{n:7} {what}')


if __name__ == '__main__': main()
