"A property: whatever the wiring, the folded network gives the same outputs, and what is kept has a reason."
import random

import torch
from hypothesis import HealthCheck, given, note, settings, strategies as st

from fasterai.fold.verify import difference, run
from fasterai.misc.bn_folding import BN_Folder
from helpers import assert_untouched, norms, randomise, snapshot
from random_nets import build, outputs, random_network

x = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
more = torch.randn(3, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))*3 - 1
large = torch.randn(2, 4, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
inputs = x, more, large


@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_random_network_gives_the_same(data):
    source = random_network(lambda n: data.draw(st.integers(0, n-1)))
    note(source)
    torch.manual_seed(0)
    model, bn = randomise(build(source)), BN_Folder(**{switch: data.draw(st.booleans()) for switch in ('through_relu', 'reparameterize', 'series', 'scales')})
    want = outputs(model, inputs)
    if want[0] is None: return
    before = snapshot(model)
    for example in ((), (x,)):
        new = bn.fold(model, *example)
        assert_untouched(model, before)
        for args, out in zip(inputs, want): assert out is None or difference(out, run(new, (args.clone(),), {})).relative < 1e-9
        rows = {r.name: r for r in bn.report} # of scales and merged layers, too
        assert bn.scales or sum(not r.is_layer for r in bn.report) == len(norms(model))
        assert {*norms(model)} <= rows.keys() and sorted(norms(new)) == sorted(n for n in norms(model) if rows[n].why)


def test_random_networks_fold():
    "else the property says nothing"
    folded = {(): 0, (x,): 0}
    for seed in range(40):
        model = randomise(build(random_network(random.Random(seed).randrange)))
        for example in folded:
            try: folded[example] += BN_Folder().plan(model, *example).folded
            except ValueError: pass # it writes into what overlaps itself
    assert min(folded.values()) > 10, folded
