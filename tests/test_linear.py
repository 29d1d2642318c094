"Linear layers that are one: merged in series and in parallel, or left as they are, with an example and without."
import copy

import pytest, torch
import torch.nn.functional as F
from torch import nn

from fasterai.fold.apply import Nothing
from fasterai.fold.verify import difference, run
from fasterai.misc.bn_folding import BN_Folder
from helpers import assert_untouched, net, randomise, snapshot

x = torch.randn(3, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
more = torch.randn(5, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
examples = pytest.mark.parametrize('example', [False, True], ids=['symbolic', 'example'])
def conv(i=4, o=4, k=1, **kw): return nn.Conv2d(i, o, k, **kw)
def same(k=3, **kw): return nn.Conv2d(4, 4, k, padding=k//2, **kw)
def bn(n=4): return nn.BatchNorm2d(n)
def hooked(m): m.register_forward_hook(lambda m, x, y: None); return m
def deep(x): return x.mean((2, 3))
class Same(nn.Conv2d):
    "A subclass"


series = dict( # what goes, and the largest layer that is left
    linear=(lambda: net(lambda m, x: m.b(m.a(deep(x))), a=nn.Linear(4, 8), b=nn.Linear(8, 3)), 'b'),
    linear_dropout_linear=(lambda: net(lambda m, x: m.b(m.drop(m.a(deep(x)))), a=nn.Linear(4, 8), drop=nn.Dropout(), b=nn.Linear(8, 3, bias=False)), 'b'),
    no_bias_at_all=(lambda: net(lambda m, x: m.b(m.a(deep(x))), a=nn.Linear(4, 8, bias=False), b=nn.Linear(8, 3, bias=False)), 'b'),
    conv_pointwise=(lambda: net(lambda m, x: m.b(m.a(x)), a=conv(o=16, k=3, stride=2, padding=1), b=conv(16)), 'b'),
    pointwise_conv=(lambda: net(lambda m, x: m.b(m.a(x)), a=conv(o=8), b=conv(8, 4, 3, dilation=2)), 'a'),
    grouped_pointwise=(lambda: net(lambda m, x: m.b(m.a(x)), a=conv(o=16, k=3, groups=4), b=conv(16, 4)), 'b'),
    both_grouped=(lambda: net(lambda m, x: m.b(m.a(x)), a=conv(o=8, k=3, groups=2), b=conv(8, 8, groups=2)), 'b'),
    depthwise_pointwise=(lambda: net(lambda m, x: m.b(m.a(x)), a=conv(k=3, groups=4), b=conv(4, 1)), 'b'),
    transposed=(lambda: net(lambda m, x: m.b(m.a(x)), a=nn.ConvTranspose2d(4, 16, 3, stride=2, groups=2), b=conv(16, 2)), 'b'),
    three=(lambda: net(lambda m, x: m.c(m.b(m.a(x))), a=conv(o=8), b=conv(8, 8), c=conv(8, 4, 3)), 'a b'),
    with_batchnorms=(lambda: net(lambda m, x: m.bn2(m.b(m.bn1(m.a(x)))), a=conv(o=16, k=3, bias=False), bn1=bn(16), b=conv(16, bias=False), bn2=bn()), 'b bn1 bn2'),
    pooled=(lambda: net(lambda m, x: m.b(F.adaptive_avg_pool2d(m.a(x), 1).flatten(1)), a=conv(o=8), b=nn.Linear(8, 3)), 'b'),
    tokens=(lambda: net(lambda m, x: m.b(m.a(x).flatten(2).transpose(1, 2)), a=conv(o=8, k=2, stride=2), b=nn.Linear(8, 4)), None), # how it is written is for any number of channels, but not of places
    permuted=(lambda: net(lambda m, x: m.b(m.a(x).permute(0, 2, 3, 1)), a=conv(o=8, k=2, stride=2), b=nn.Linear(8, 4)), 'b'),
    called_twice_together=(lambda: net(lambda m, x: m.b(m.a(x)) + m.b(m.a(x.flip(3))), a=conv(o=8, k=3), b=conv(8)), 'b'),
)
example_only = {'linear', 'linear_dropout_linear', 'no_bias_at_all', 'permuted'} # without one, the rank of what a Linear is given is not known, or its strides
series_kept = dict(
    read_twice=lambda: net(lambda m, x: m.b(y := m.a(x)).mean() + y.mean(), a=conv(o=8, k=3), b=conv(8)),
    activation_between=lambda: net(lambda m, x: m.b(m.a(x).relu()), a=conv(o=8, k=3), b=conv(8)),
    padded=lambda: net(lambda m, x: m.b(m.a(x)), a=conv(o=8), b=conv(8, 4, 3, padding=1)),
    both_see_more=lambda: net(lambda m, x: m.b(m.a(x)), a=conv(o=8, k=2), b=conv(8, 4, 2)),
    strided_pointwise=lambda: net(lambda m, x: m.b(m.a(x)), a=conv(o=8, k=3), b=conv(8, 4, stride=2)),
    more_work=lambda: net(lambda m, x: m.b(m.a(deep(x))), a=nn.Linear(4, 1), b=nn.Linear(1, 4)),
    more_work_before_the_pool=lambda: net(lambda m, x: m.b(F.adaptive_avg_pool2d(m.a(x), 1).flatten(1)), a=conv(o=8, k=3), b=nn.Linear(8, 9)),
    viewed_by_its_channels=lambda: net(lambda m, x: m.b(m.a(deep(x)).view(-1, 8)), a=nn.Linear(4, 8), b=nn.Linear(8, 4)),
    divided_by_its_channels=lambda: net(lambda m, x: m.b(y := m.a(x)) / y.shape[1], a=conv(o=8, k=3), b=conv(8)),
    squeezed=lambda: net(lambda m, x: m.b(m.a(x).mean((2, 3), keepdim=True).squeeze()), a=conv(o=8, k=3), b=nn.Linear(8, 1)),
    hook_between=lambda: net(lambda m, x: m.b(m.a(x)), a=hooked(conv(o=8, k=3)), b=conv(8)),
    shared_weight=lambda: net(lambda m, x: m.b(m.a(x)) * m.b.weight.mean(), a=conv(o=8, k=3), b=conv(8)),
    shared_layer=lambda: net(lambda m, x: m.b(m.a(x)).mean() + m.a(x).relu().mean(), a=conv(o=8, k=3), b=conv(8)),
    weights_used_by_the_parent=lambda: net(lambda m, x: m.b(F.conv2d(x, m.a.weight, m.a.bias)), a=conv(o=8, k=3), b=conv(8)),
    shape_used_by_another=lambda: net(lambda m, x: m.b(y := m.a(x)) + torch.ones(1, 1, 1, 1).expand_as(y).sum(), a=conv(o=8, k=3), b=conv(8)),
    other_order=lambda: net(lambda m, x: m.b(F.channel_shuffle(m.a(x), 2)), a=conv(o=8, k=3), b=conv(8)),
    part_of_it=lambda: net(lambda m, x: m.b(m.a(x)[:, :8]), a=conv(o=16, k=3), b=conv(8)),
    subclass=lambda: net(lambda m, x: m.b(m.a(x)), a=Same(4, 8, 3), b=conv(8)),
    reflected=lambda: net(lambda m, x: m.b(m.a(x)), a=conv(o=8), b=conv(8, 4, 3, padding=1, padding_mode='reflect')),
    returned=lambda: net(lambda m, x: (m.b(y := m.a(x)), y), a=conv(o=8, k=3), b=conv(8)),
)

parallel = dict(
    two_kernels=(lambda: net(lambda m, x: m.a(x) + m.b(x), a=same(), b=conv()), 'b'),
    three_and_a_batchnorm=(lambda: net(lambda m, x: (m.id(x) + m.na(m.a(x)) + m.nb(m.b(x))).relu(), id=bn(), a=same(bias=False), na=bn(), b=conv(bias=False), nb=bn()), 'b id na nb'),
    depthwise=(lambda: net(lambda m, x: m.a(x) + m.b(x) + m.id(x), a=same(groups=4), b=conv(groups=4), id=bn()), 'b id'),
    depthwise_into_dense=(lambda: net(lambda m, x: m.a(x) + m.b(x), a=same(), b=same(groups=4)), 'b'),
    five_and_three=(lambda: net(lambda m, x: m.b(x) + m.a(x), a=same(5), b=same(3)), 'b'),
    dilated=(lambda: net(lambda m, x: m.a(x) + m.b(x), a=conv(k=3, padding=2, dilation=2), b=conv()), 'b'),
    strided=(lambda: net(lambda m, x: m.a(x) + m.b(x), a=same(stride=2), b=conv(stride=2)), 'b'),
    same_padding=(lambda: net(lambda m, x: m.a(x) + m.b(x), a=conv(k=3, padding='same'), b=conv(padding='valid')), 'b'),
    beside_a_shortcut=(lambda: net(lambda m, x: m.a(x) + x + m.b(x), a=same(), b=conv()), 'b'),
    summed_by_python=(lambda: net(lambda m, x: sum(l(x) for l in (m.a, m.b, m.c)), a=same(), b=conv(), c=same()), None),
    in_place=(lambda: net(lambda m, x: m.a(x).add_(m.b(x)), a=same(), b=conv()), 'b'),
    linear=(lambda: net(lambda m, x: m.a(y := deep(x)) + m.b(y), a=nn.Linear(4, 3), b=nn.Linear(4, 3, bias=False)), 'a'),
    no_bias=(lambda: net(lambda m, x: m.a(x) + m.b(x), a=same(bias=False), b=conv(bias=False)), 'b'),
    twice=(lambda: net(lambda m, x: (m.a(y := m.a(x) + m.b(x)) + m.b(y)), a=same(), b=conv()), 'b'),
)
parallel_kept = dict(
    other_inputs=lambda: net(lambda m, x: m.a(x) + m.b(x.relu()), a=same(), b=conv()),
    written_between=lambda: net(lambda m, x: (y := x*1, m.a(y), y.relu_())[1] + m.b(y), a=same(), b=conv()),
    zero_written_into=lambda: net(lambda m, x: m.b(x).add_(m.a(x)), a=same(), b=conv()),
    multiplied=lambda: net(lambda m, x: m.a(x) * m.b(x), a=same(), b=conv()),
    added_twice=lambda: net(lambda m, x: (y := m.a(x)) + y + m.b(x), a=same(), b=conv()),
    added_and_read=lambda: net(lambda m, x: m.a(x).relu() + (y := m.b(x)) + y.mean(), a=same(), b=conv()),
    one_called_twice=lambda: net(lambda m, x: m.b(x) + m.a(x) + m.b(x), a=same(), b=conv()),
    off_centre=lambda: net(lambda m, x: m.a(x)[:, :, 1:-1, 1:-1] + m.b(x), a=same(), b=conv(k=3)),
    other_stride=lambda: net(lambda m, x: m.a(x) + F.interpolate(m.b(x), size=x.shape[2:]), a=same(), b=conv(stride=2)),
    even_kernel=lambda: net(lambda m, x: m.a(x) + m.b(x), a=conv(k=2, padding='same'), b=conv()),
    shifted=lambda: net(lambda m, x: m.a(x) + m.b(x), a=conv(k=3), b=conv(k=2, dilation=2)),
    written_as_data=lambda: net(lambda m, x: (y := x*1, r := m.a(y), setattr(y, 'data', y.relu()), r + m.b(y))[-1], a=same(), b=conv()),
    written_by_foreach=lambda: net(lambda m, x: (y := x*1, r := m.a(y), torch._foreach_mul_([y], 2.), r + m.b(y))[-1], a=same(), b=conv()),
    beside_a_function=lambda: net(lambda m, x: F.conv2d(input=x, weight=m.a.weight, padding=1) + m.b(x), a=same(), b=conv()),
    beside_computed_weights=lambda: net(lambda m, x: F.conv2d(x, m.a.weight.tanh(), padding=1) + m.b(x), a=same(), b=conv()),
    weight_norm=lambda: net(lambda m, x: m.a(x) + m.b(x), a=torch.nn.utils.weight_norm(same()), b=conv()),
    weighted=lambda: net(lambda m, x: torch.add(m.a(x), m.b(x), alpha=2), a=same(), b=conv()),
    asked_for_its_shape=lambda: net(lambda m, x: m.a(x) + (y := m.b(x)) + y.dim(), a=same(), b=conv()),
    zeros_like_it=lambda: net(lambda m, x: m.a(x) + (y := m.b(x)) + torch.ones_like(y), a=same(), b=conv()),
    partial_sum_read=lambda: net(lambda m, x: m.a(x) + (y := m.b(x) + 1) + y.amax(), a=same(), b=conv()),
    hooked=lambda: net(lambda m, x: m.a(x) + m.b(x), a=same(), b=hooked(conv())),
    weight_asked_for=lambda: net(lambda m, x: m.a(y := x.to(m.b.weight.dtype)) + m.b(y), a=same(), b=conv()),
    bias_asked_for=lambda: net(lambda m, x: m.a(x) + (m.b(x) if m.b.bias is not None else 2*m.b(x)), a=same(), b=conv()),
    weights_read=lambda: net(lambda m, x: m.a(x) + m.b(x) + m.b.weight.mean(), a=same(), b=conv()),
    reflected=lambda: net(lambda m, x: m.a(x) + m.b(x), a=same(padding_mode='reflect'), b=conv()),
    less_dense=lambda: net(lambda m, x: m.a(x) + m.b(x), a=same(groups=4), b=conv()),
    transposed=lambda: net(lambda m, x: m.a(x) + m.b(x), a=nn.ConvTranspose2d(4, 4, 3, padding=1), b=conv()),
    subclass=lambda: net(lambda m, x: m.a(x) + m.b(x), a=Same(4, 4, 3, padding=1), b=conv()),
)


def merged(make, example, **switches):
    "Fold, and check that nothing else changed"
    torch.manual_seed(0)
    model = randomise(make())
    before, folder = snapshot(model), BN_Folder(**switches)
    new = folder.fold(model, *([x] if example else []))
    assert_untouched(model, before)
    assert all(difference(run(model, (i,), {}), run(new, (i,), {})).relative < 1e-12 for i in (x, more))
    return model, new, folder

def gone(report): return {r.name for r in report if r.folded}

@examples
@pytest.mark.parametrize('name', series)
def test_in_series(name, example):
    make, names = series[name]
    model, new, folder = merged(make, example, series=True)
    if names is None or name in example_only and not example: return
    assert len(gone(folder.report)) == len(names.split()) and not folder.report.kept, folder.report
    layers = [r for r in folder.report if r.is_layer]
    for r in layers:
        assert type(new.get_submodule(r.name)) is nn.Identity and 'in series' in str(folder.report)
    size = lambda m: sum(p.numel() for n, p in m.named_parameters() if 'weight' in n)
    assert size(new) < size(model)
    for n, m in new.named_modules(): # what a layer says of itself is what it is
        if isinstance(m, nn.Linear): assert m.weight.shape == (m.out_features, m.in_features)
        elif isinstance(m, nn.Conv2d): assert m.weight.shape[:2] == (m.out_channels, m.in_channels//m.groups)
        elif isinstance(m, nn.ConvTranspose2d): assert m.weight.shape[:2] == (m.in_channels, m.out_channels//m.groups)
    assert not any(r.is_layer for r in BN_Folder().plan(model))

@examples
@pytest.mark.parametrize('name', parallel)
def test_in_parallel(name, example):
    make, names = parallel[name]
    model, new, folder = merged(make, example, reparameterize=True)
    assert not folder.report.kept and (gone(folder.report) == {*names.split()} if names else len(gone(folder.report)) == 2), folder.report
    for r in folder.report:
        if r.joins: assert type(new.get_submodule(r.name)) is Nothing
    new.load_state_dict(copy.deepcopy(new).state_dict())

@examples
@pytest.mark.parametrize('make, switch', [pytest.param(make, switch, id=f'{switch}-{name}') for switch, kept in dict(series=series_kept, reparameterize=parallel_kept).items() for name, make in kept.items()])
def test_keeps(make, switch, example):
    _, new, folder = merged(make, example, **{switch: True})
    assert len(folder.report) == 0, folder.report


@examples
@pytest.mark.parametrize('kind', [1, 3])
def test_other_ranks(kind, example):
    torch.manual_seed(0)
    layer = {1: nn.Conv1d, 3: nn.Conv3d}[kind]
    model = net(lambda m, x: m.a(y := m.c(m.d(x))) + m.b(y), a=layer(4, 8, 3, padding=1), b=layer(4, 8, 1), d=layer(4, 8, 3), c=layer(8, 4, 1)).double().eval()
    given, folder = torch.randn(2, 4, *[5]*kind, dtype=torch.float64), BN_Folder(series=True, reparameterize=True)
    new = folder.fold(model, *([given] if example else []))
    assert gone(folder.report) == {'b', 'c'} and difference(run(model, (given,), {}), run(new, (given,), {})).relative < 1e-13


def both(): return net(lambda m, x: (m.nb(m.b(y := m.d(m.c(x)))) + m.a(y)).relu(), a=same(), b=conv(), nb=bn(), c=conv(4, 8, 3), d=conv(8, 4))

@examples
def test_in_place(example):
    torch.manual_seed(0)
    model = randomise(both())
    want, weight, folder = run(model, (x,), {}), model.c.weight, BN_Folder(series=True, reparameterize=True)
    assert folder.fold(model, *([x] if example else []), inplace=True) is model
    assert difference(want, run(model, (x,), {})).relative < 1e-13 and model.c.weight is weight and weight.shape == (4, 4, 3, 3)

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('channels_last', [False, True])
def test_dtypes_and_formats(dtype, channels_last):
    torch.manual_seed(0)
    exact = randomise(both())
    model, given = copy.deepcopy(exact).to(dtype), x.to(dtype)
    if channels_last: model, given = model.to(memory_format=torch.channels_last), given.to(memory_format=torch.channels_last)
    new = BN_Folder(series=True, reparameterize=True).fold(model, given)
    assert {t.dtype for t in (*new.parameters(), *new.buffers())} == {dtype} and new.a.weight.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert difference(run(exact, (x,), {}), run(new, (given,), {})).relative < 20*torch.finfo(dtype).eps

def test_state_and_plan():
    "The weights of one load into the skeleton of another; a plan changes nothing and says the same"
    torch.manual_seed(0)
    model, folder = randomise(both()), BN_Folder(series=True, reparameterize=True)
    new = folder.fold(model, x)
    skeleton = folder.fold(randomise(both(), seed=1), x)
    skeleton.load_state_dict(new.state_dict())
    assert difference(run(new, (x,), {}), run(skeleton, (x,), {})).relative == 0
    before, plan = snapshot(model), folder.plan(model, x)
    assert_untouched(model, before)
    assert [(r.name, r.how) for r in plan] == [(r.name, r.how) for r in folder.report] and '2 layers can be merged with others' in str(plan)

def test_what_no_float16_holds_stays():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)).half().eval()
    for l in model: nn.init.constant_(l.weight, 250.)
    folder = BN_Folder(series=True)
    new = folder.fold(model, torch.ones(1, 4).half()*1e-3)
    assert len(folder.report) == 0 and type(new[0]) is nn.Linear

@examples
def test_an_exception_leaves_the_model_as_it_was(example, monkeypatch):
    "In place, after the BatchNorms were folded and while the layers are merged"
    from fasterai.fold import apply
    def broken(*args): raise KeyboardInterrupt
    for name in ('in_series', 'in_parallel', '_edits'):
        torch.manual_seed(0)
        model = randomise(both())
        before = snapshot(model)
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(apply, name, broken)
            BN_Folder(series=True, reparameterize=True).fold(model, *([x] if example else []), inplace=True)
        assert_untouched(model, before)

@examples
def test_a_batchnorm_beside_a_linear(example):
    "They keep their channels on other axes"
    torch.manual_seed(0)
    model, given = randomise(net(lambda m, x: m.a(x) + m.b(x), a=nn.Linear(4, 4), b=nn.BatchNorm1d(4))), torch.randn(3, 4, 4, dtype=torch.float64)
    new = BN_Folder(reparameterize=True).fold(model, *([given] if example else []))
    assert difference(run(model, (given,), {}), run(new, (given,), {})).relative == 0

class Optional(nn.Module):
    def __init__(self, f, **layers): super().__init__(); self.f = f; [self.add_module(n, m) for n, m in layers.items()]
    def forward(self, x, skip=None): return self.f(self, x, skip)
def in_between(m, x, skip): return m.b(m.a(x) if skip is None else m.a(x) + skip)
def into_a_part(m, x, skip):
    y = m.b(x)
    if skip is not None: y += skip
    return y + m.a(x)

@examples
@pytest.mark.parametrize('f, layers', [(in_between, lambda: dict(a=conv(4, 16, 3), b=conv(16))), (in_between, lambda: dict(a=conv(), b=bn())), (into_a_part, lambda: dict(a=same(), b=conv()))])
def test_an_argument_that_the_example_leaves_out(f, layers, example):
    torch.manual_seed(0)
    model, skip = randomise(Optional(f, **layers())), torch.randn(1, 1, 1, 1, dtype=torch.float64)
    new = BN_Folder(series=True, reparameterize=True).fold(model, *([x] if example else []))
    for args in ((x,), (x, skip)): assert difference(run(model, args, {}), run(new, args, {})).relative < 1e-12

@pytest.mark.parametrize('f', [lambda m, x: m.b(m.a(x))[..., :m.a.out_channels], lambda m, x: m.b(m.a(x))*torch.tensor(float(m.a.out_channels)), lambda m, x: m.b(m.a(x)) if isinstance(m.b, nn.Conv2d) else m.a(x), lambda m, x: m.b(m.a(x)) * m.a.weight.shape[0]])
def test_code_that_looks_at_a_layer(f):
    "Then its layers stay as they are"
    model, folder = net(f, a=conv(4, 16, 3), b=conv(16, 8)).double().eval(), BN_Folder(series=True)
    for example in ((), (x,)): assert difference(run(model, (x,), {}), run(folder.fold(model, *example), (x,), {})).relative == 0 and len(folder.report) == 0

def test_gradients_of_a_parameter_that_changes_its_shape():
    model = net(lambda m, x: m.b(m.a(x)), a=conv(4, 16, 3), b=conv(16)).double().eval()
    model(x).sum().backward()
    BN_Folder(series=True).fold(model, x, inplace=True)(x).sum().backward()
    assert model.a.weight.grad.shape == model.a.weight.shape

class Shares(nn.Module):
    "Its copy is itself"
    def __init__(self): super().__init__(); self.a, self.n = conv(), bn()
    def forward(self, x): return self.n(self.a(x))
    def __deepcopy__(self, memo): return self

def test_a_copy_that_is_the_original():
    model = nn.Sequential(Shares()).eval()
    with pytest.raises(TypeError, match='gives the original'): BN_Folder(series=True).fold(model)
    assert type(model[0].n) is nn.BatchNorm2d

@examples
def test_exported(example):
    "A zero is traced, scripted and exported as a constant"
    torch.manual_seed(0)
    model = randomise(both())
    new = BN_Folder(reparameterize=True, series=True).fold(model, *([x] if example else []))
    want = run(model, (x,), {})
    assert difference(want, torch.jit.trace(new, x)(x)).relative < 1e-13
    assert difference(want, torch.export.export(new, (x,)).module()(x)).relative < 1e-13
