"What the tests share."
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fasterai.fold.verify import difference, run
from fasterai.misc.bn_folding import BN_Folder


def randomise(model, seed=0):
    "Random statistics and affine parameters, negative γ included, in eval mode and float64: a fresh BatchNorm would hide a wrong fold"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if not isinstance(m, _BatchNorm) or m.running_mean is None: continue
            m.running_mean.normal_(0, .5, generator=g)
            m.running_var.uniform_(.3, 2, generator=g)
            if m.affine:
                m.weight.uniform_(.5, 1.5, generator=g).mul_(torch.randint(0, 2, m.weight.shape, generator=g)*2-1)
                m.bias.normal_(0, .5, generator=g)
    return model.double().eval()


def snapshot(model):
    "All that must not change about a caller's model"
    state = {k: v.clone() for k, v in model.state_dict().items()}
    attrs = {n: {k: v for k, v in vars(m).items() if not isinstance(v, dict)} for n, m in model.named_modules()}
    kinds = {n: (type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    return state, attrs, kinds, torch.get_rng_state()


def assert_untouched(model, before):
    state, attrs, kinds, rng = before
    now = model.state_dict()
    assert now.keys() == state.keys() and all(torch.equal(now[k], v) for k, v in state.items())
    assert kinds == {n: (type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    for n, m in model.named_modules():
        mine = {k: v for k, v in vars(m).items() if not isinstance(v, dict)}
        assert mine.keys() == attrs[n].keys() and all(mine[k] is attrs[n][k] for k in mine), n
    assert torch.equal(rng, torch.get_rng_state())


def fold(model, *xs, example=True, limit=1e-12, inputs=(), **kwargs):
    "Fold, and check outputs, the original and the report: `(folded model, report)`. `inputs` are more inputs to agree on."
    before, bn = snapshot(model), BN_Folder()
    new = bn.fold(model, *(xs if example else ()), **(kwargs if example else {}))
    assert_untouched(model, before)
    for args in (xs, *inputs):
        d = difference(run(model, args, kwargs), run(new, args, kwargs))
        assert d.relative < limit, f'outputs differ by {d}\n{bn.report}'
    assert type(new) is type(model) and [n for n, _ in new.named_modules() if not n.count('.')] == [n for n, _ in model.named_modules() if not n.count('.')]
    for row in bn.report:
        m = new.get_submodule(row.name)
        assert row.folded != isinstance(m, _BatchNorm) and row.folded == (not row.why) == bool(row.into), row
    return new, bn.report


def norms(model): return [n for n, m in model.named_modules() if isinstance(m, _BatchNorm)]


class Net(nn.Module):
    "A network of named layers"
    def __init__(self, **layers):
        super().__init__()
        for name, m in layers.items(): setattr(self, name, m)


def net(forward, kind=Net, **layers):
    "A network from named layers and a `forward` of itself and its inputs"
    return randomise(type('Net', (kind,), {'forward': forward})(**layers))


def asserting(m, x):
    "A `forward` with an assertion (here, as pytest rewrites those in test modules)"
    assert x.shape[1] == 4, 'four channels'
    return m.bn(m.conv(x))
