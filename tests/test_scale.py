"Modules that scale and shift: folded as BatchNorms are, or kept, with an example and without."
import copy

import pytest, timm, torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, LayerScale, LayerScale2d
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fasterai.fold.verify import difference, run
from fasterai.misc.bn_folding import BN_Folder
from helpers import assert_untouched, net, randomise, snapshot

x = torch.randn(3, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
examples = pytest.mark.parametrize('example', [False, True], ids=['symbolic', 'example'])
def conv(i=4, o=4, k=1, **kw): return nn.Conv2d(i, o, k, **kw)
def numbers(*size): return torch.rand(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + .5

class Scale(nn.Module):
    "Does `f(self, x)` with tensors of its own"
    def __init__(self, f, learned=True, **own):
        super().__init__()
        for n, t in own.items(): self.register_parameter(n, nn.Parameter(t)) if learned else self.register_buffer(n, t)
        self.f = f
    def forward(self, x): return self.f(self, x)
def normalize(shape=(1, 4, 1, 1)): return Scale(lambda m, x: (x - m.mean)/m.std, False, mean=numbers(*shape), std=numbers(*shape))
def scale2d(inplace=False): m = LayerScale2d(4, inplace=inplace); nn.init.uniform_(m.gamma, -1, 1); return m
def scale(inplace=False): m = LayerScale(4, inplace=inplace); nn.init.uniform_(m.gamma, -1, 1); return m
def hooked(m): m.register_forward_hook(lambda m, x, y: None); return m


folds = dict(
    layer_scale=lambda: net(lambda m, x: m.s(m.fc(x.flatten(2).transpose(1, 2))), fc=nn.Linear(4, 4), s=scale()),
    layer_scale_2d=lambda: net(lambda m, x: x + m.s(m.c(x)), c=conv(k=3, padding=1), s=scale2d()),
    in_place=lambda: net(lambda m, x: x + m.s(m.c(x)), c=conv(), s=scale2d(True)),
    input_normalised=lambda: net(lambda m, x: m.c(m.s(x)), s=normalize(), c=conv(k=3)),
    both_sides=lambda: net(lambda m, x: m.b(m.c(m.a(x))), a=normalize(), c=conv(), b=scale2d()),
    one_number=lambda: net(lambda m, x: m.c(m.s(x).mean((2, 3))), s=Scale(lambda m, x: 3 - m.a*x + m.b, a=numbers(1), b=numbers(1)[0]), c=nn.Linear(4, 2)),
    between_batchnorms=lambda: net(lambda m, x: m.b(m.s(m.a(m.c(x)))), c=conv(), a=nn.BatchNorm2d(4), s=scale2d(), b=nn.BatchNorm2d(4)),
    called_twice=lambda: net(lambda m, x: m.s(m.c(m.s(m.c(x)))), c=conv(), s=scale2d()),
    dropped_first=lambda: net(lambda m, x: m.s(m.drop(m.c(x))), c=conv(), drop=nn.Dropout(.5), s=scale2d()),
)
def tokens(x): return x.flatten(2).transpose(1, 2)
norms = dict( # the normalisation stays, without its weight and bias
    layer_norm=lambda: net(lambda m, x: m.fc(m.n(tokens(m.c(x)))), c=conv(), n=nn.LayerNorm(4), fc=nn.Linear(4, 3)),
    layer_norm_2d=lambda: net(lambda m, x: m.b(m.n(m.c(x))), c=conv(), n=LayerNorm2d(4), b=conv()),
    layer_norm_without_bias=lambda: net(lambda m, x: m.fc(m.n(tokens(m.c(x)))), c=conv(), n=nn.LayerNorm(4, bias=False), fc=nn.Linear(4, 3, bias=False)),
    rms_norm=lambda: net(lambda m, x: m.fc(m.n(tokens(m.c(x)))), c=conv(), n=nn.RMSNorm(4), fc=nn.Linear(4, 3, bias=False)),
    group_norm=lambda: net(lambda m, x: m.b(m.n(m.c(x))), c=conv(), n=nn.GroupNorm(2, 4), b=conv(k=3)),
    instance_norm=lambda: net(lambda m, x: m.b(m.n(m.c(x)).mean((2, 3))), c=conv(), n=nn.InstanceNorm2d(4, affine=True), b=nn.Linear(4, 2)),
    read_by_three=lambda: net(lambda m, x: m.q(y := m.n(tokens(m.c(x)))) + m.k(y) * m.v(y), c=conv(), n=nn.LayerNorm(4), q=nn.Linear(4, 3), k=nn.Linear(4, 3), v=nn.Linear(4, 3)),
    called_twice=lambda: net(lambda m, x: m.fc(m.n(m.fc(m.n(tokens(m.c(x)))))), c=conv(), n=nn.LayerNorm(4), fc=nn.Linear(4, 4)),
)
norms_kept = dict(
    padded=(lambda: net(lambda m, x: m.b(m.n(m.c(x))), c=conv(), n=nn.GroupNorm(2, 4), b=conv(k=3, padding=1)), 'after it: `b` pads with zeros'),
    read_twice=(lambda: net(lambda m, x: m.b(y := m.n(m.c(x))) + y, c=conv(), n=nn.GroupNorm(2, 4), b=conv()), '`add` stands between'),
    last=(lambda: net(lambda m, x: m.n(m.c(x)), c=conv(), n=nn.GroupNorm(2, 4)), 'the caller of the model'),
    weight_read=(lambda: net(lambda m, x: m.b(m.n(m.c(x)))*m.n.weight.sum(), c=conv(), n=nn.GroupNorm(2, 4), b=conv()), '`n.weight` is also read by'),
    hooked=(lambda: net(lambda m, x: m.b(m.n(m.c(x))), c=conv(), n=hooked(nn.GroupNorm(2, 4)), b=conv()), 'the hook'),
    weight_needed=(lambda: net(lambda m, x: m.b(m.n(m.c(x))), c=conv(), n=Needing(2, 4), b=conv()), None), # its code fails without a weight
    weight_asked_for=(lambda: net(lambda m, x: m.b(m.n(m.c(x.to(m.n.weight.dtype)))), c=conv(), n=nn.GroupNorm(2, 4), b=conv()), "the model's code asks for what it would lose"),
    two_in_one=(lambda: net(lambda m, x: m.n(m.c(x)), c=conv(), n=TwoNorms()), 'it is not always called in the same way'),
    fixed_bias=(lambda: net(lambda m, x: m.b(m.n(m.c(x))), c=conv(), n=FixedBias(), b=conv()), None),
    shape_needed=(lambda: net(lambda m, x: m.b(m.n(m.c(x))), c=conv(), n=Named(), b=conv()), None),
    several_axes=(lambda: net(lambda m, x: m.fc(m.n(m.c(x))), c=conv(), n=nn.LayerNorm((6, 6)), fc=nn.Linear(6, 2)), None),
    uses_the_batch=(lambda: net(lambda m, x: m.n(m.c(x)), c=conv(), n=nn.InstanceNorm2d(4)), None),
)
class TwoNorms(nn.Module):
    "Two norms, each with parameters of this module"
    def __init__(self):
        super().__init__()
        self.g1, self.b1, self.g2, self.b2 = (nn.Parameter(numbers(4)) for _ in range(4))
        self.c1, self.c2 = conv().double(), conv().double()
    def forward(self, x): return self.c2(F.group_norm(self.c1(F.group_norm(x, 2, self.g1, self.b1)), 2, self.g2, self.b2))
class FixedBias(nn.Module):
    "Its bias is no parameter"
    def __init__(self): super().__init__(); self.weight = nn.Parameter(numbers(4)); self.register_buffer('bias', numbers(4))
    def forward(self, x): return F.group_norm(x, 2, self.weight, self.bias)
class Named(nn.Module):
    "Its parameters have other names, and it needs them"
    def __init__(self): super().__init__(); self.gamma, self.beta = nn.Parameter(numbers(4)), nn.Parameter(numbers(4))
    def forward(self, x): return F.layer_norm(x.movedim(1, -1), self.gamma.shape, self.gamma, self.beta).movedim(-1, 1)
class Needing(nn.GroupNorm):
    def forward(self, x): return super().forward(x.to(self.weight.dtype))

keeps = dict( # with a word of the reason, or `None` where it is not even seen as a scale
    read_twice=(lambda: net(lambda m, x: m.s(y := m.c(x)) + y, c=conv(), s=scale2d()), 'is also read by `add`'),
    padded=(lambda: net(lambda m, x: m.c(m.s(x)), s=normalize(), c=conv(k=3, padding=1)), 'pads with zeros'),
    activation_between=(lambda: net(lambda m, x: m.s(m.c(x).relu()), c=conv(), s=scale2d()), 'stands between'),
    in_place_before=(lambda: net(lambda m, x: m.c(m.s(x.relu())), s=scale2d(True), c=conv()), 'writes in place'),
    weight_shared=(lambda: net(lambda m, x: m.s(m.c(x))*m.s.gamma.sum(), c=conv(), s=scale2d()), '`s.gamma` is also read by'),
    hooked=(lambda: net(lambda m, x: m.s(m.c(x)), c=conv(), s=hooked(scale2d())), 'the hook'),
    other_axis=(lambda: net(lambda m, x: m.s(m.c(x)), c=conv(), s=Scale(lambda m, x: x*m.g, g=numbers(6))), 'axis'),
    computed=(lambda: net(lambda m, x: m.s(m.c(x)), c=conv(), s=Scale(lambda m, x: x*m.g.exp(), g=numbers(4, 1, 1))), None),
    from_its_input=(lambda: net(lambda m, x: m.s(m.c(x)), c=conv(), s=Scale(lambda m, x: x*m.g*x, g=numbers(4, 1, 1))), None),
    a_matrix=(lambda: net(lambda m, x: m.s(m.c(x)), c=conv(), s=Scale(lambda m, x: x*m.g, g=numbers(6, 6))), None),
    divided_by_it=(lambda: net(lambda m, x: m.s(m.c(x)), c=conv(), s=Scale(lambda m, x: m.g/x, g=numbers(1))), None),
    more_channels=(lambda: net(lambda m, x: m.c(m.s(m.grey(x))), grey=conv(o=1), s=normalize((1, 3, 1, 1)), c=conv(3)), None), # one channel becomes three
    more_axes=(lambda: net(lambda m, x: m.s(m.c(x)), c=conv(), s=Scale(lambda m, x: x*m.g, g=numbers(1, 1, 1, 1, 1))), None),
    two_axes=(lambda: net(lambda m, x: m.s(m.c(x)), c=conv(), s=Scale(lambda m, x: x*m.g + m.b, g=numbers(4, 1, 1), b=numbers(6))), None),
)


rank_unknown = {'layer_scale', 'other_axis', 'input_normalised', 'one_number', 'padded', 'in_place_before'} # without an example nothing is known of their input

@examples
@pytest.mark.parametrize('name', folds)
def test_folds(name, example):
    torch.manual_seed(0)
    model = folds[name]()
    if name in rank_unknown and not example: return unchanged(model)
    before, want, folder = snapshot(model), run(model, (x,), {}), BN_Folder(scales=True)
    new = folder.fold(model, *([x] if example else []))
    assert_untouched(model, before)
    assert folder.report.kept == 0 and any(r.steps for r in folder.report) and all(type(new.get_submodule(r.name)) is nn.Identity for r in folder.report)
    assert 'BatchNorms and scales' in str(folder.report) and difference(want, run(new, (x,), {})).relative < 1e-13
    plain = BN_Folder()
    plain.fold(model, *([x] if example else []))
    assert not any(r.steps for r in plain.report)
    assert folder.fold(model, *([x] if example else []), inplace=True) is model and difference(want, run(model, (x,), {})).relative < 1e-13


def unchanged(model):
    folder = BN_Folder(scales=True)
    new = folder.fold(model)
    assert folder.report.folded == 0 and difference(run(model, (x,), {}), run(new, (x,), {})).relative == 0

@examples
@pytest.mark.parametrize('name', keeps)
def test_keeps(name, example):
    torch.manual_seed(0)
    make, why = keeps[name]
    model, folder = make(), BN_Folder(scales=True)
    if name in rank_unknown and not example: return unchanged(model)
    new = folder.fold(model, *([x] if example else []))
    assert folder.report.folded == 0 and len(folder.report) == (why is not None) and type(new.s) is type(model.s)
    if why: assert why in folder.report['s'].why
    assert difference(run(model, (x,), {}), run(new, (x,), {})).relative < 1e-13


@examples
@pytest.mark.parametrize('name', norms)
def test_folds_what_a_normalisation_does_last(name, example):
    torch.manual_seed(0)
    model = norms[name]()
    for p in model.parameters(): nn.init.uniform_(p, -1, 1)
    before, want, folder = snapshot(model), run(model, (x,), {}), BN_Folder(scales=True)
    new = folder.fold(model, *([x] if example else []))
    assert_untouched(model, before)
    assert folder.report.kept == 0 and len(folder.report) == 1 and type(new.n) is type(model.n)
    assert not [*new.n.parameters()] and 'the normalisation stays' in str(folder.report)
    if isinstance(new.n, nn.LayerNorm): assert new.n.weight.eq(1).all() and (new.n.bias is None or new.n.bias.eq(0).all()) # twice as slow without, on a CPU
    else: assert new.n.weight is None and getattr(new.n, 'bias', None) is None
    assert [n for n, m in new.named_modules() if n != 'n' and getattr(m, 'bias', None) is not None] == [n for n, m in model.named_modules() if getattr(m, 'bias', None) is not None and n != 'n'] # none is gained for a mere scale
    assert difference(want, run(new, (x,), {})).relative < 1e-13
    assert folder.fold(model, *([x] if example else []), inplace=True) is model and difference(want, run(model, (x,), {})).relative < 1e-13
    model.load_state_dict(new.state_dict())

class Holds(nn.Module):
    "Normalises with parameters of its own, and holds a BatchNorm"
    def __init__(self): super().__init__(); self.g, self.b, self.c, self.n = nn.Parameter(numbers(4)), nn.Parameter(numbers(4)), conv(), nn.BatchNorm2d(4)
    def forward(self, x): return self.n(self.c(F.group_norm(x, 2, self.g, self.b)))

@examples
@pytest.mark.parametrize('inplace', [False, True])
def test_what_stays_bare_may_hold_what_goes(example, inplace):
    torch.manual_seed(0)
    model, folder = randomise(nn.Sequential(conv(), Holds())), BN_Folder(scales=True)
    want, before = run(model, (x,), {}), snapshot(model)
    new = folder.fold(model, *([x] if example else []), inplace=inplace)
    if not inplace: assert_untouched(model, before)
    assert folder.report.kept == 0 and len(folder.report) == 2 and new[1].g is new[1].b is None and type(new[1].n) is nn.Identity
    assert difference(want, run(new, (x,), {})).relative < 1e-13

class Block(nn.Module):
    "Does `f(self, x)` with layers and parameters of its own"
    def __init__(self, f, **own):
        super().__init__()
        for n, o in own.items(): setattr(self, n, nn.Parameter(o) if isinstance(o, torch.Tensor) else o)
        self.f = f
    def forward(self, x): return self.f(self, x)
def per_channel(t): return t.view(1, -1, 1, 1)
def branch(m, x): return x + (m.c(x) if m.g is None else m.c(x)*per_channel(m.g))
def in_place(m, x):
    y = m.c(x)
    if m.g is not None: y *= m.g.reshape(1, 4, 1, 1)
    return y
def two(m, x):
    if m.g is None: return m.c(x)
    return m.h.view(4, 1, 1)*m.c(x*per_channel(m.g))
params = dict(
    layer_scale=lambda: Block(branch, c=conv(k=3, padding=1), g=numbers(4)),
    in_place=lambda: Block(in_place, c=conv(), g=numbers(4)),
    before_a_layer=lambda: Block(lambda m, x: m.c(x.relu() if m.g is None else x.relu()*per_channel(m.g)), c=conv(k=3), g=numbers(4)),
    shift=lambda: Block(lambda m, x: m.c(x) if m.g is None else m.c(x) + per_channel(m.g), c=conv(bias=False), g=numbers(4)),
    one_number=lambda: Block(lambda m, x: x + (m.c(x) if m.g is None else m.g*m.c(x)), c=conv(), g=numbers(1)[0]),
    tokens=lambda: Block(lambda m, x: (lambda y: y if m.g is None else y*m.g)(m.fc(tokens(m.c(x)))), c=conv(), fc=nn.Linear(4, 4), g=numbers(4)),
    called_twice=lambda: net(lambda m, x: m.b(m.b(x)), b=Block(branch, c=conv(), g=numbers(4))),
    with_a_batchnorm=lambda: net(lambda m, x: m.b(m.c(x)), c=conv(), b=Block(lambda m, x: x + (m.n(m.c(x)) if m.g is None else m.n(m.c(x))*per_channel(m.g)), c=conv(), n=nn.BatchNorm2d(4), g=numbers(4))),
)
params_kept = dict(
    asks_nobody=(lambda: Block(lambda m, x: m.c(x)*per_channel(m.g), c=conv(), g=numbers(4)), 'is not seen to leave it out where it is `None`'),
    something_else_instead=(lambda: Block(lambda m, x: m.c(x).relu() if m.g is None else m.c(x)*per_channel(m.g), c=conv(), g=numbers(4)), 'is not seen to leave it out'),
    another_value_instead=(lambda: Block(lambda m, x: (lambda a, b: (b, a)[0] if m.g is None else a*per_channel(m.g))(m.c(x), m.d(x)), c=conv(), d=conv(), g=numbers(4)), 'is not seen to leave it out'),
    two_of_which_it_asks_for_one=(lambda: Block(two, c=conv(), g=numbers(4), h=numbers(4)), 'is not seen to leave it out'),
    cannot_be_followed=(lambda: Block(lambda m, x: branch(m, x) if range(x.shape[0]) else x, c=conv(), g=numbers(4)), 'is not seen to leave it out'),
    asked_by_its_parent=(lambda: net(lambda m, x: m.b(x)*(2 if m.b.g is None else 3), b=Block(branch, c=conv(), g=numbers(4))), "the model's code asks for what it would lose"),
    also_read=(lambda: Block(lambda m, x: (lambda y: y if m.g is None else y*m.g.sum())(branch(m, x)), c=conv(), g=numbers(4)), '`g` is also read by'),
    input_read_twice=(lambda: Block(lambda m, x: (y := m.c(x)) + (y if m.g is None else y*per_channel(m.g)), c=conv(), g=numbers(4)), 'is also read by'),
    activation_between=(lambda: Block(lambda m, x: (lambda y: y if m.g is None else y*per_channel(m.g))(m.c(x).relu()), c=conv(), g=numbers(4)), 'stands between'),
    along_the_batch=(lambda: Block(lambda m, x: m.c(x) if m.g is None else m.c(x)*m.g.view(3, 1, 1, 1), c=conv(), g=numbers(3)), None),
    of_two_blocks=(lambda: shared(net(lambda m, x: m.b(m.a(x)), a=Block(branch, c=conv(), g=numbers(4)), b=Block(branch, c=conv(), g=numbers(4)))), 'is also read by'),
)
def shared(m): m.b.g = m.a.g; return m

@examples
@pytest.mark.parametrize('inplace', [False, True])
@pytest.mark.parametrize('name', params)
def test_folds_a_parameter(name, inplace, example):
    torch.manual_seed(0)
    model, folder = randomise(params[name]()), BN_Folder(scales=True)
    if name == 'before_a_layer' and not example: return unchanged(model)
    want, before = run(model, (x,), {}), snapshot(model)
    new = folder.fold(model, *([x] if example else []), inplace=inplace)
    if not inplace: assert_untouched(model, before)
    assert folder.report.kept == 0 and sum(r.is_parameter for r in folder.report) == 1 and [n for n, _ in new.named_parameters() if n.endswith('g')] == []
    assert difference(want, run(new, (x,), {})).relative < 1e-13

@examples
@pytest.mark.parametrize('name', params_kept)
def test_keeps_a_parameter(name, example):
    torch.manual_seed(0)
    make, why = params_kept[name]
    model, folder = randomise(make()), BN_Folder(scales=True)
    new = folder.fold(model, *([x] if example else []))
    assert folder.report.folded == 0 and difference(run(model, (x,), {}), run(new, (x,), {})).relative < 1e-13
    assert [n for n, _ in new.named_parameters()] == [n for n, _ in model.named_parameters()]
    if name == 'cannot_be_followed' and not example: return
    assert any(why in r.why for r in folder.report) if why else len(folder.report) == 0

@examples
@pytest.mark.parametrize('name', norms_kept)
def test_keeps_what_a_normalisation_does_last(name, example):
    make, why = norms_kept[name]
    model, folder = make(), BN_Folder(scales=True)
    for p in model.parameters(): nn.init.uniform_(p, -1, 1)
    new = folder.fold(model, *([x] if example else []))
    assert [bool(why) and why in r.why for r in folder.report] == [True]*bool(why), folder.report
    assert difference(run(model, (x,), {}), run(new, (x,), {})).relative == 0

@examples
@pytest.mark.parametrize('kind, size', [(nn.InstanceNorm1d, (5,)), (nn.InstanceNorm2d, (5, 6)), (nn.InstanceNorm3d, (3, 4, 5))])
@pytest.mark.parametrize('affine', [False, True])
def test_an_instance_norm_with_running_statistics_is_a_batchnorm(kind, size, affine, example):
    torch.manual_seed(0)
    layer = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(size)]
    model, given = randomise(nn.Sequential(layer(4, 6, 3), kind(6, affine=affine, track_running_stats=True), nn.ReLU())), torch.randn(2, 4, *size, dtype=torch.float64)
    folder = BN_Folder(scales=True)
    new = folder.fold(model, *([given] if example else []))
    assert folder.report.kept == 0 and type(new[1]) is nn.Identity and difference(run(model, (given,), {}), run(new, (given,), {})).relative < 1e-13
    assert len(BN_Folder().plan(model, *([given] if example else []))) == 0


@examples
def test_a_scale_that_makes_another_dtype_stays(example):
    "bfloat16 times float32 is float32; integers over a float are floats"
    scale = Scale(lambda m, x: x*m.g, g=numbers(4, 1, 1))
    for layers, given in (([conv().bfloat16(), scale.float()], x.bfloat16()), ([nn.Unflatten(1, (4, 6, 6)), copy.deepcopy(scale).double(), conv().double()], (x*9).to(torch.uint8).flatten(1))):
        model, folder = nn.Sequential(*layers).eval(), BN_Folder(scales=True)
        new = folder.fold(model, *([given] if example else []))
        a, b = run(model, (given,), {}), run(new, (given,), {})
        assert a.dtype == b.dtype and torch.equal(a, b) and folder.report.folded == 0


@examples
def test_vision_transformer(example):
    torch.manual_seed(0)
    model = randomise(VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, init_values=1., num_classes=5))
    for n, p in model.named_parameters():
        if 'gamma' in n: nn.init.uniform_(p, -1, 1)
    image, folder = torch.randn(2, 3, 16, 16, dtype=torch.float64), BN_Folder(scales=True)
    new = folder.fold(model, *([image] if example else []))
    assert folder.report.folded == (9 if example else 8) and len(folder.report) == 9 and difference(run(model, (image,), {}), run(new, (image,), {})).relative < 1e-13


def test_all_switches():
    "fastvit has blocks that merge themselves, LayerScales and BatchNorms"
    torch.manual_seed(0)
    model, image = randomise(timm.create_model('fastvit_t8', num_classes=3)), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    folder = BN_Folder(through_relu=True, reparameterize=True, scales=True)
    new = folder.fold(model, image)
    assert folder.report.kept == 0 and any(r.steps for r in folder.report) and any(r.merged for r in folder.report)
    assert difference(run(model, (image,), {}), run(new, (image,), {})).relative < 1e-12


class Alone(nn.Module):
    "An instance norm of one item without a batch, whose channels are on the first axis"
    def __init__(self, tracked): super().__init__(); self.start, self.norm, self.end = nn.Linear(6, 5), nn.InstanceNorm1d(5, affine=True, track_running_stats=tracked), nn.Linear(5, 3)
    def forward(self, x): return self.end(self.norm(self.start(x.flatten(1))))

@pytest.mark.parametrize('tracked', [False, True])
def test_an_instance_norm_without_a_batch(tracked):
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = randomise(Alone(tracked)).double().eval()
    nn.init.uniform_(model.norm.weight, -2, 2, generator=torch.Generator().manual_seed(1))
    for example in ((), (x,)): assert difference(model(x), BN_Folder(scales=True).fold(model, *example)(x)).relative < 1e-12


class ByTheInput(nn.Module):
    "Its parameter has the shape that the input gives it"
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.rand(6) + .5)
    def forward(self, x): return x*self.w.view(x.shape[1], -1)


def test_a_scale_whose_shape_goes_by_the_input():
    "of one token it scales the channels, of six the tokens"
    model = randomise(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), ByTheInput(), nn.Linear(6, 2)))
    one, six = (torch.randn(2, n, 3, dtype=torch.float64) for n in (1, 6))
    folder = BN_Folder(scales=True)
    new = folder.fold(model, one)
    assert not folder.report.folded
    for given in (one, six): assert difference(run(model, (given,), {}), run(new, (given,), {})).relative < 1e-13
