"What others get wrong: each case that must not fold, beside its twin that must."
import builtins, contextlib, functools, operator, sys, types
from dataclasses import dataclass

import einops, pytest, torch, torchvision
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from fasterai.fold.verify import difference, run
from fasterai.misc.bn_folding import BN_Folder, FoldError
from helpers import Net, assert_untouched, asserting, fold, net, norms, randomise, snapshot

x = torch.randn(3, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
flat = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
def conv(i=4, o=4, k=3, **kw): return nn.Conv2d(i, o, k, **{'padding': k//2, **kw})
def bn(c=4, **kw): return nn.BatchNorm2d(c, **kw)
def lin(i=4, o=4): return nn.Linear(i, o)
def bn1(c=4): return nn.BatchNorm1d(c)


class Bag(Net):
    "Holds its layers a second time, in a plain list"
    def __init__(self, **layers): super().__init__(**layers); self.bag = [*layers.values()]


@dataclass
class Outputs:
    y: torch.Tensor
    more: object = None
class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x*x.sigmoid()
class Masked(nn.Conv2d):
    "Takes a mask, as speech models do for the lengths of their inputs"
    def forward(self, x, mask): return super().forward(x*mask)
class MaskedDeaf(nn.Conv2d):
    "The same, without its bias"
    def forward(self, x, mask): return F.conv2d(x*mask, self.weight, None)
def hooked(m): m.register_forward_hook(lambda m, x, y: None); return m


folds = dict( # every BatchNorm is folded, with an example and without
    declared_last_first=lambda: net(lambda m, x: m.conv(m.first(x)), conv=conv(k=1), first=bn()),
    run_order_is_not_declared_order=lambda: net(lambda m, x: m.b(m.c2(m.a(m.c1(x)))), b=bn(), c1=conv(), a=bn(), c2=conv()),
    pair_called_twice=lambda: net(lambda m, x: m.bn(m.conv(m.bn(m.conv(x)).relu())), conv=conv(), bn=bn()),
    two_batchnorms=lambda: net(lambda m, x: m.b(m.a(m.conv(x))), conv=conv(), a=bn(), b=bn()),
    sum_of_two=lambda: net(lambda m, x: m.bn(m.a(x) + m.b(x)), a=conv(), b=conv(k=1), bn=bn()),
    sum_written_in_place=lambda: net(lambda m, x: m.bn(m.a(x).add_(m.b(x))), a=conv(), b=conv(k=1), bn=bn()),
    difference_of_two=lambda: net(lambda m, x: m.bn(m.a(x) - m.b(x)), a=conv(), b=conv(k=1), bn=bn()),
    concatenation=lambda: net(lambda m, x: m.bn(torch.cat([m.a(x), m.b(x)], 1)), a=conv(), b=conv(o=2), bn=bn(6)),
    before_a_concatenation=lambda: net(lambda m, x: m.c(torch.cat([m.bn(x), x], dim=1)), bn=bn(), c=conv(8, 3, 1)),
    several_readers=lambda: net(lambda m, x: m.a(y := m.bn(x)) + m.b(y), bn=bn(), a=conv(k=1), b=conv(k=1)),
    relu_in_place_afterwards=lambda: net(lambda m, x: m.bn(m.conv(x)).relu_(), conv=conv(), bn=bn()),
    pooled=lambda: net(lambda m, x: m.bn(F.avg_pool2d(m.conv(x), 2)), conv=conv(), bn=bn()),
    pooled_flattened_dropped=lambda: net(lambda m, x: m.fc(m.drop(m.bn(x).mean((2, 3)))), bn=bn(), drop=nn.Dropout(), fc=lin()),
    pixel_shuffled=lambda: net(lambda m, x: m.bn(F.pixel_shuffle(m.conv(x), 2)), conv=conv(o=16), bn=bn()),
    interpolated=lambda: net(lambda m, x: m.bn(F.interpolate(m.conv(x), scale_factor=2, mode='bilinear')), conv=conv(), bn=bn()),
    reflected=lambda: net(lambda m, x: m.conv(F.pad(m.bn(x), (1, 1, 1, 1), mode='reflect')), bn=bn(), conv=conv(padding=0)),
    held_in_a_list=lambda: net(lambda m, x: m.bag[1](m.bag[0](x)), Bag, conv=conv(), bn=bn()),
    returned_in_an_object=lambda: net(lambda m, x: Outputs(m.bn(m.conv(x))), conv=conv(), bn=bn()),
    size_asked_for_its_type=lambda: net(lambda m, x: m.bn(c) if isinstance((c := m.conv(x)).shape[1], int) and isinstance(c.shape, tuple) and isinstance(c, torch.Tensor) else c.relu(), conv=conv(), bn=bn()),
    two_names=lambda: net(lambda m, x: m.again(m.conv(x)), conv=conv(), bn=(b := bn()), again=b),
    nested=lambda: net(lambda m, x: m.bn(m.body(x)), body=nn.Sequential(nn.Sequential(conv())), bn=bn()),
    hook_elsewhere=lambda: net(lambda m, x: m.act(m.bn(m.conv(x))), conv=conv(), bn=bn(), act=hooked(nn.ReLU())),
    frozen_weights=lambda: net(lambda m, x: m.bn(m.conv(x)), conv=conv().requires_grad_(False), bn=bn()),
    flatten_before=lambda: net(lambda m, x: m.bn(m.fc(x.flatten(1))), fc=lin(144), bn=bn1()),
    shape_asked_between=lambda: net(lambda m, x: m.bn(c) if (c := m.conv(x)).shape[1] == 4 else m.bn(c).relu(), conv=conv(), bn=bn()),
    summed_by_python=lambda: net(lambda m, x: m.bn(sum([m.a(x), m.b(x)])), a=conv(), b=conv(k=1), bn=bn()),
    autograd_function_behind=lambda: net(lambda m, x: Swish.apply(m.bn(m.conv(x))), conv=conv(), bn=bn()),
    layers_held_in_a_sequential=lambda: net(lambda m, x: functools.reduce(lambda y, l: l(y) + x, m.held, x), held=nn.Sequential(*[nn.Sequential(conv(), bn()) for _ in range(2)])),
    both_ways_fold=lambda: net(lambda m, x: m.bn(m.conv(x)) if x.mean() > 0 else m.bn(m.conv(x)).relu(), conv=conv(), bn=bn()),
)
keeps = dict( # no BatchNorm is folded, with an example or without; the reason names what stands in the way
    first_in_its_container=(lambda: net(lambda m, x: m.conv(m.bn(x).relu()), bn=bn(), conv=conv()), 'relu'),
    declared_in_pairs_only=(lambda: net(lambda m, x: m.conv(m.bn(x)), conv=conv(), bn=bn()), 'pads with zeros'),
    activation_called_between=(lambda: net(lambda m, x: m.bn(F.relu(m.conv(x))), conv=conv(), bn=bn()), 'relu'),
    output_read_twice=(lambda: net(lambda m, x: m.bn(c := m.conv(x)) + c, conv=conv(), bn=bn()), 'also read by `add`'),
    output_returned=(lambda: net(lambda m, x: (m.bn(c := m.conv(x)), c), conv=conv(), bn=bn()), 'also read by the caller'),
    output_returned_in_a_dict=(lambda: net(lambda m, x: {'y': m.bn(c := m.conv(x)), 'c': [c]}, conv=conv(), bn=bn()), 'also read by the caller'),
    output_returned_in_an_object=(lambda: net(lambda m, x: [Outputs(m.bn(c := m.conv(x)), c)], conv=conv(), bn=bn()), 'also read by'),
    own_output_returned=(lambda: net(lambda m, x: (m.conv(b := m.bn(x)), b), conv=conv(k=1), bn=bn()), 'also read by the caller'),
    layer_called_twice=(lambda: net(lambda m, x: m.bn(m.conv(m.conv(x))), conv=conv(), bn=bn()), 'called 2 times'),
    one_layer_two_batchnorms=(lambda: net(lambda m, x: m.a(c := m.conv(x)).relu() + m.b(c).relu(), conv=conv(), a=bn(), b=bn()), 'also read by'),
    one_batchnorm_after_a_layer_and_without=(lambda: net(lambda m, x: m.bn(m.conv(x)).relu() + m.bn(x).relu(), conv=conv(), bn=bn()), ''),
    weight_read_elsewhere=(lambda: net(lambda m, x: m.bn(m.conv(x)) * m.conv.weight.mean(), conv=conv(), bn=bn()), 'weight is also read'),
    weight_used_by_a_function=(lambda: net(lambda m, x: m.bn(m.conv(x)) + F.conv2d(x, m.conv.weight, padding=1), conv=conv(), bn=bn()), ''),
    bias_read_elsewhere=(lambda: net(lambda m, x: m.bn(m.conv(x)) + m.conv.bias.sum(), conv=conv(), bn=bn()), 'also read'),
    batchnorm_weight_read_elsewhere=(lambda: net(lambda m, x: m.bn(m.conv(x)) + m.bn.weight.sum(), conv=conv(), bn=bn()), '`bn.weight` is also read'),
    half_of_the_sum_has_no_layer=(lambda: net(lambda m, x: m.bn(m.conv(x) + x), conv=conv(), bn=bn()), ''),
    same_layer_on_both_sides_of_a_sum=(lambda: net(lambda m, x: m.bn((c := m.conv(x)) + c), conv=conv(), bn=bn()), ''),
    half_read_after_the_other_is_written=(lambda: net(lambda m, x: ((a := (c := m.conv(x))[:, :2]), (b := c[:, 2:]), (y := m.bn(b)), a.relu_(), y + b)[-1], conv=conv(), bn=bn(2)), ''),
    half_returned_after_the_other_is_written=(lambda: net(lambda m, x: ((a := (c := m.conv(x))[:, :2]), (b := c[:, 2:]), (y := m.bn(b)), a.relu_(), (y, b))[-1], conv=conv(), bn=bn(2)), ''),
    spread_over_the_channels=(lambda: net(lambda m, x: m.bn(m.a(x) + m.b(x)), a=conv(), b=conv(o=1), bn=bn()), 'spread over the channels'),
    counts_padded_zeros=(lambda: net(lambda m, x: m.bn(F.avg_pool2d(m.conv(x), 3, 1, 1)), conv=conv(), bn=bn()), 'padded zeros'),
    max_pool=(lambda: net(lambda m, x: m.bn(F.max_pool2d(m.conv(x), 2)), conv=conv(), bn=bn()), 'max_pool2d'),
    zero_padded_by_a_function=(lambda: net(lambda m, x: m.conv(F.pad(m.bn(x), (1, 1, 1, 1))), bn=bn(), conv=conv(padding=0)), 'pad'),
    padded_1x1=(lambda: net(lambda m, x: m.conv(m.bn(x)), bn=bn(), conv=conv(k=1, padding=1)), 'pads with zeros'),
    one_of_two_readers_pads=(lambda: net(lambda m, x: m.a(y := m.bn(x)) + m.b(y), bn=bn(), a=conv(k=1), b=conv()), 'pads with zeros'),
    hook_on_the_layer=(lambda: net(lambda m, x: m.bn(m.conv(x)), conv=hooked(conv()), bn=bn()), 'hook'),
    hook_on_the_batchnorm=(lambda: net(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=hooked(bn())), 'hook'),
    hook_on_a_container_between=(lambda: net(lambda m, x: m.bn(m.body(x)), body=hooked(nn.Sequential(conv())), bn=bn()), 'hook'),
    weight_norm=(lambda: net(lambda m, x: m.bn(m.conv(x)), conv=nn.utils.parametrizations.weight_norm(conv()), bn=bn()), ''),
    old_weight_norm=(lambda: net(lambda m, x: m.bn(m.conv(x)), conv=nn.utils.weight_norm(conv()), bn=bn()), ''),
    spectral_norm=(lambda: net(lambda m, x: m.bn(m.conv(x)), conv=nn.utils.parametrizations.spectral_norm(conv()), bn=bn()), ''),
    pruned=(lambda: net(lambda m, x: m.bn(m.conv(x)), conv=prune.l1_unstructured(conv(), 'weight', .5), bn=bn()), ''),
    cut_off_and_read=(lambda: net(lambda m, x: m.bn((c := m.conv(x))[:, :, :-1]) + c[:, :, 1:], conv=conv(), bn=bn()), ''),
    one_added=(lambda: net(lambda m, x: m.bn(m.conv(x) + 1), conv=conv(), bn=bn()), 'adds a number'),
    multiplied=(lambda: net(lambda m, x: m.bn(m.conv(x) * m.other(x)), conv=conv(), other=conv(), bn=bn()), 'mul'),
)
with_example = dict( # what only a recorded run shows
    linear_rank_2=lambda: (net(lambda m, x: m.bn(m.fc(x)), fc=lin(), bn=bn1()), flat),
    linear_flattened=lambda: (net(lambda m, x: m.bn(m.fc(x).flatten(0, 1)).reshape(3, 5, 4), fc=lin(), bn=bn1()), torch.randn(3, 5, 4).double()),
    linear_transposed=lambda: (net(lambda m, x: m.bn(m.fc(x).transpose(1, 2)).transpose(1, 2), fc=lin(), bn=bn1()), torch.randn(3, 5, 4).double()),
    qkv=lambda: (net(lambda m, x: m.q(y := m.bn(x)) + m.k(y) * m.v(y), bn=bn1(), q=lin(), k=lin(), v=lin()), flat),
    slices_apart=lambda: (net(lambda m, x: torch.cat([m.a(c[:, :2]), m.b(c[:, 2:])], 1) if (c := m.conv(x)) is not None else 0, conv=conv(), a=bn(2), b=bn(2)), x),
    one_slice=lambda: (net(lambda m, x: torch.cat([m.a(p), q], 1) if (c := m.conv(x)) is not None and (p := c[:, :2]) is not None and (q := c[:, 2:].relu()) is not None else 0, conv=conv(), a=bn(2)), x),
    last_positions_cut_off=lambda: (net(lambda m, x: m.bn(m.conv(x)[:, :, :-2, 1:]), conv=conv(), bn=bn()), x),
    first_position=lambda: (net(lambda m, x: m.bn(m.conv(x)[:, :, 0]), conv=conv(), bn=nn.BatchNorm1d(4)), x),
    antialiased=lambda: (net(lambda m, x: m.bn(F.interpolate(m.conv(x), scale_factor=.5, mode='bilinear', antialias=True)), conv=conv(), bn=bn()), x),
    layer_with_a_mask=lambda: (net(lambda m, x: m.bn(m.conv(x, x.new_ones(3, 1, 6, 6))), conv=Masked(4, 4, 3, bias=False), bn=bn()), x),
    chunks=lambda: (net(lambda m, x: (lambda a, b: m.a(a) * b.sigmoid())(*m.conv(x).chunk(2, 1)), conv=conv(), a=bn(2)), x),
    flattened_into_linear=lambda: (net(lambda m, x: m.fc(m.bn(x).flatten(1)), bn=bn(), fc=lin(144, 3)), x),
    viewed_into_linear=lambda: (net(lambda m, x: m.fc(m.bn(x).view(len(x), -1)), bn=bn(), fc=lin(144, 3)), x),
    permuted_into_linear=lambda: (net(lambda m, x: m.fc(m.bn(x).permute(0, 2, 3, 1)), bn=bn(), fc=lin(4, 3)), x),
    stacked_shuffle=lambda: (net(lambda m, x: m.c(m.bn(x).view(len(x), 2, 2, 6, 6).transpose(1, 2).flatten(1, 2)), bn=bn(), c=conv(k=1)), x),
    looped=lambda: (net(lambda m, x: functools.reduce(lambda y, i: m.bn(m.conv(y)).relu(), range(3), x), conv=conv(), bn=bn()), x),
    weight_of_the_parent=lambda: (net(lambda m, x: m.bn(F.conv2d(x, m.w, m.b)), w=nn.Parameter(torch.randn(4, 4, 3, 3)), b=nn.Parameter(torch.randn(4)), bn=bn()), x),
    keyword_inputs=lambda: (net(lambda m, a, b: m.bn(m.conv(a + b)), conv=conv(), bn=bn()), x, x),
    list_input=lambda: (net(lambda m, xs: [m.block(x) for x in xs], block=nn.Sequential(conv(), bn())), [x, x[:1]]),
)
without_bias = lambda m, x: F.conv2d(x, m.weight, None, m.stride, m.padding)
class Deaf(nn.Conv2d):
    "Ignores its bias"
    def forward(self, x): return without_bias(self, x)
class Loud(nn.Conv2d):
    "Does more than convolve"
    def forward(self, x): return super().forward(x) * 2
class Same(nn.Conv2d):
    "Pads by itself, as timm's Conv2dSame does, where the size asks for it"
    def forward(self, x):
        p = max((-(-x.shape[-1]//self.stride[0])-1)*self.stride[0] + self.kernel_size[0] - x.shape[-1], 0)
        return F.conv2d(F.pad(x, (p//2, p-p//2)*2), self.weight, self.bias, self.stride)
class IfNeeded(nn.Conv2d):
    "The same, where a size needs it"
    def forward(self, x): return super().forward(F.pad(x, (0, 1, 0, 1)) if x.shape[-1] % 2 else x)
class Doubles(nn.BatchNorm2d):
    "Normalises and more"
    def forward(self, x): return super().forward(x) * 2
keeps_with_example = dict(
    output_returned_in_an_iterator=(lambda: (net(lambda m, x: Outputs(m.bn(c := m.conv(x)), iter([c])), conv=conv(), bn=bn()), x), 'also read by'),
    ignores_its_bias_and_takes_a_mask=(lambda: (net(lambda m, x: m.bn(m.conv(x, x.new_ones(3, 1, 6, 6))), conv=MaskedDeaf(4, 4, 3, bias=False), bn=bn()), x), 'may not use the bias'),
    ignores_its_bias=(lambda: (net(lambda m, x: m.bn(m.conv(x)), conv=Deaf(4, 4, 3, bias=False), bn=bn()), x), 'may not use the bias'),
    scales_its_output=(lambda: (net(lambda m, x: m.bn(m.conv(x)), conv=Loud(4, 4, 3), bn=bn()), x), 'stands between'),
    own_padding_after=(lambda: (net(lambda m, x: m.conv(m.bn(x)), conv=Same(4, 4, 2, 2), bn=bn()), x), 'pad'),
    own_padding_where_needed=(lambda: (net(lambda m, x: m.conv(m.bn(x)), conv=IfNeeded(4, 4, 2, 2), bn=bn()), x), 'may be padded'),
    padding_where_needed=(lambda: (net(lambda m, x: m.conv(F.pad(m.bn(x), (0, 1)) if x.shape[-1] % 2 else m.bn(x)), conv=conv(k=2, padding=0), bn=bn()), x), ''),
    batchnorm_that_does_more=(lambda: (net(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=Doubles(4)), x), ''),
    overlapping_slices=(lambda: (net(lambda m, x: torch.cat([m.a(c[:, :3]), c[:, 2:].relu()], 1) if (c := m.conv(x)) is not None else 0, conv=conv(), a=bn(3)), x), 'also read'),
    linear_rank_3=(lambda: (net(lambda m, x: m.bn(m.fc(x)), fc=lin(), bn=bn1()), torch.randn(3, 4, 4).double()), 'normalises axis 1'),
    written_through_a_view=(lambda: (net(lambda m, x: m.bn(c) if (c := m.conv(x)) is not None and c[:, :2].relu_() is not None else 0, conv=conv(), bn=bn()), x), ''),
    input_written_later=(lambda: (net(lambda m, x: m.fc(b.flatten(1)) if (y := x*1) is not None and (b := m.bn(y)) is not None and y.zero_() is not None else 0, bn=bn(), fc=lin(144)), x), 'may write into its input'),
    taken_out_by_numpy=(lambda: (net(lambda m, x: m.bn(c) + float(c.detach().numpy().sum()) if (c := m.conv(x)) is not None else 0, conv=conv(), bn=bn()), x), 'numpy'),
    other_way_on_other_data=(lambda: (net(lambda m, x: m.bn(m.conv(x)) if x.mean() > -9 else m.conv(x), conv=conv(), bn=bn()), x, ), ''),
    other_way_for_another_size=(lambda: (Any(lambda m, x: m.bn(m.conv(x).relu() if x.shape[0] > 5 else m.conv(x)), conv=conv(), bn=bn()).double().eval(), x), 'another input may take another way'),
    kept_on_the_module=(lambda: (net(lambda m, x: m.bn(m.keep(m.conv(x))), conv=conv(), bn=bn(), keep=Keep()), x), 'also read'),
)
class Any(nn.Module):
    "Takes any number of arguments, so that its code can't be followed"
    def __init__(self, f, **layers): super().__init__(); self.f = f; [self.add_module(n, m) for n, m in layers.items()]
    def forward(self, *xs): return self.f(self, *xs)
class Keep(nn.Module):
    def forward(self, x): self.last = x; return x


@pytest.mark.parametrize('example', [False, True])
@pytest.mark.parametrize('name', folds)
def test_folds(name, example):
    new, report = fold(folds[name](), x, example=example)
    assert not norms(new), report


@pytest.mark.parametrize('example', [False, True])
@pytest.mark.parametrize('name', keeps)
def test_keeps(name, example):
    make, why = keeps[name]
    m = make()
    new, report = fold(m, x, example=example)
    assert norms(new) == norms(m), report
    assert any(why in r.why for r in report), report


@pytest.mark.parametrize('name', with_example)
def test_folds_with_an_example(name):
    model, *xs = with_example[name]()
    new, report = fold(model, *xs)
    assert not norms(new), report
    fold(model, *xs, example=False)


@pytest.mark.parametrize('name', keeps_with_example)
def test_keeps_with_an_example(name):
    make, why = keeps_with_example[name]
    model, *xs = make()
    new, report = fold(model, *xs)
    assert norms(new) == norms(model), report
    assert any(why in r.why for r in report), report
    fold(model, *xs, example=False)


def test_subclass_that_uses_a_gained_bias_and_pads_by_itself():
    new, report = fold(net(lambda m, x: m.bn(m.conv(x)), conv=Same(4, 4, 3, 2, bias=False), bn=bn()), x)
    assert not norms(new)


@pytest.mark.parametrize('example', [False, True])
def test_tied_weights(example):
    a, b = conv(), conv()
    b.weight = a.weight
    m = net(lambda m, x: m.n(m.a(x)) + m.b(x), a=a, b=b, n=bn())
    new, report = fold(m, x, example=example)
    assert norms(new) and new.a.weight is new.b.weight


def test_every_way_counts():
    "A recorded run saw one way; the other forbids the fold, and is found on other data"
    m = net(lambda m, x: m.bn(m.conv(x)) if x.mean() > 0 else m.conv(x), conv=conv(), bn=bn())
    new, report = fold(m, x.abs(), inputs=[(-x.abs(),)])
    assert norms(new) and 'chooses its way' in report['bn'].why


def test_an_optional_argument_is_tried_both_ways():
    def forward(m, x, raw=None): return m.conv(x) if raw is not None else m.bn(m.conv(x))
    class Optional(nn.Module):
        def __init__(self): super().__init__(); self.conv, self.bn = conv(), bn()
        def forward(self, x, raw=None): return forward(self, x, raw)
    new, report = fold(randomise(Optional()), x, example=False)
    assert norms(new)


def test_a_failed_assertion_is_no_way():
    assert not norms(fold(net(asserting, conv=conv(), bn=bn()), x, example=False)[0])


def test_view_that_needs_the_batchnorms_strides():
    m = net(lambda m, x: m.bn(m.fc(x).transpose(1, 2)).view(3, -1), fc=lin(), bn=bn1())
    new, report = fold(m, torch.randn(3, 5, 4).double())
    assert norms(new) and 'strides' in report['bn'].why


class Backbone(nn.Module):
    "Whose parts another may use"
    def __init__(self): super().__init__(); self.conv, self.bn, self.fc = conv(), bn(), lin()
    def features(self, x): return self.bn(self.conv(x)).relu()
    def forward(self, x): return self.fc(self.features(x).mean((2, 3)))
reaching = dict(a_method=lambda m, x: m.body.features(x), its_layers=lambda m, x: m.body.bn(m.body.conv(x)).relu())

@pytest.mark.parametrize('name', reaching)
def test_a_parent_that_reaches_into_a_backbone(name):
    for example in (False, True): assert not norms(fold(net(reaching[name], body=Backbone()), x, example=example)[0])
    other = net(lambda m, x: m.body.bn(m.body.conv(x).relu()), body=Backbone())
    for example in (False, True): assert norms(fold(other, x, example=example)[0])


@pytest.mark.parametrize('example', [False, True])
def test_torchvisions_frozen_batchnorm(example):
    frozen = torchvision.ops.FrozenBatchNorm2d(4)
    for t in frozen.buffers(): t.uniform_(.5, 2)
    model = nn.Sequential(conv(), frozen, nn.ReLU(), conv()).double().eval()
    new, report = fold(model, x, example=example)
    assert report.folded == 1 and type(new[1]) is nn.Identity


def of_some_kind(m, x):
    y = m.norm(m.conv(x))
    return m.end(y[0] if isinstance(y, (tuple, list)) else y)
class Functional(nn.BatchNorm2d):
    def forward(self, x): return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, self.momentum, self.eps)

tensors = dict(part=lambda m, x: x[:, :4], parts=lambda m, x: torch.cat([x[:, :2] + 1, x[:, 2:]], 1), scaled=lambda m, x: x*m.gamma, laid_out=lambda m, x: x.view(x.shape[0], 2, 2, x.shape[2], x.shape[3]).transpose(1, 2).reshape(x.shape))
class Kept(nn.Module):
    def __init__(self, f): super().__init__(); self.f, self.gamma = f, nn.Parameter(torch.ones(4, 1, 1))
    def forward(self, x): return self.f(self, x)

@pytest.mark.parametrize('example', [False, True])
@pytest.mark.parametrize('name', tensors)
def test_what_comes_of_a_tensor_is_no_tuple(name, example):
    assert not norms(fold(net(lambda m, x: of_some_kind(m, m.bn(m.first(x))), first=conv(), bn=bn(), conv=conv(), norm=Kept(tensors[name]), end=conv()), x, example=example)[0])


@pytest.mark.parametrize('example', [False, True])
def test_what_a_batchnorm_gives_is_no_tuple(example):
    assert not norms(fold(net(of_some_kind, conv=conv(), norm=Functional(4), end=conv()), x, example=example)[0])


ranks = dict(by_name=lambda m, z: F.linear(weight=m.fc.weight, input=z), relu=lambda m, z: F.prelu(weight=m.fc.weight[0, :1], input=z), as_bytes=lambda m, z: z.view(torch.int64), by_a_shape=lambda m, z: z.reshape(z.shape), by_a_mask=lambda m, z: z[z > 0],
             by_numbers=lambda m, z: z[[0, 1]], by_a_switch=lambda m, z: z[True], new_axes=lambda m, z: z[..., None, 0])

@pytest.mark.parametrize('name', ranks)
def test_how_many_axes_there_are(name):
    "A way is chosen by what the trace knows of that, or by none"
    for n in range(1, 6):
        for example in ((), (x,)):
            m = net(lambda m, x: m.bn(z) if len(ranks[name](m, (z := m.conv(x)).transpose(1, 3)).shape) == n else z.relu()*2, conv=conv(), bn=bn(), fc=lin(4, 4))
            assert difference(run(m, (x,), {}), run(BN_Folder().fold(m, *example), (x,), {})).relative < 1e-12


def by_a_block(m, x, **kw): return checkpoint(m.block, x, **kw)
def by_a_function(m, x, **kw): return checkpoint(lambda y: m.block(y), x, **kw) if x.requires_grad else m.block(x)
def by_parts(m, x, **kw): return checkpoint_sequential(m.block, 2, x, **kw)
def by_its_module(m, x, **kw): return torch.utils.checkpoint.checkpoint(m.block, x, **kw)

@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('forward', [by_a_block, by_a_function, by_parts, by_its_module])
def test_checkpoints(forward, reentrant):
    for example in (False, True):
        m = net(lambda m, x: forward(m, x, use_reentrant=reentrant), block=nn.Sequential(conv(), bn(), nn.ReLU(), conv()))
        assert not norms(fold(m, x, example=example)[0])
    other = net(lambda m, x: m.bn(checkpoint(m.block, x, use_reentrant=reentrant)), block=nn.Sequential(conv(), nn.ReLU()), bn=bn())
    assert norms(fold(other, x, example=False)[0])


def test_memory_efficient_densenets():
    "A layer asks all that it is given whether it takes a gradient"
    small = dict(growth_rate=4, block_config=(2, 20), num_init_features=8, bn_size=2, num_classes=5)
    pictures = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for example in (False, True):
        kept = [norms(fold(randomise(torchvision.models.DenseNet(**small, memory_efficient=efficient)).double().eval(), pictures, example=example)[0]) for efficient in (False, True)]
        assert kept[0] == kept[1] and sum("norm1" in name for name in kept[0]) == 22 and not any("norm2" in name for name in kept[0])


class Doubled(TorchFunctionMode):
    def __torch_function__(self, f, types, args=(), kwargs=None): return f(*args, **(kwargs or {}))*(2 if f is F.conv2d else 1)
def test_a_checkpoint_in_a_context_of_its_own():
    for example in (False, True):
        m = net(lambda m, x: checkpoint(lambda y: m.bn(m.conv(y)), x, use_reentrant=False, context_fn=lambda: (Doubled(), Doubled())), conv=conv(), bn=bn())
        new, _ = fold(m, x, example=example)
        assert difference(m(x), new(x)).relative < 1e-12


class Flat(nn.Module):
    "Three axes that a BatchNorm gives in their order, and a convolution may not"
    def __init__(self, behind): super().__init__(); self.conv, self.bn, self.behind = conv(), bn1(), behind
    def forward(self, x): return self.behind(self.bn(self.conv(x).flatten(2)))
behind_flat = dict(view=lambda z: z.view(len(z), -1), as_strided=lambda z: z.as_strided((len(z), 4, z.shape[2]-1, 2), (4*z.shape[2], z.shape[2], 1, 1)), asked=lambda z: z if z.is_contiguous() else z*2)

@pytest.mark.parametrize('name', behind_flat)
def test_a_flatten_of_what_lies_otherwise(name):
    last = x.contiguous(memory_format=torch.channels_last)
    for example in ((), (last,)): # PyTorch refuses the view of another layout, and the other two give other numbers
        m = randomise(Flat(behind_flat[name]))
        new = BN_Folder().fold(m, *example)
        assert norms(new)
        for given in (x, last): assert difference(m(given), new(given)).relative < 1e-12
    folder = BN_Folder()
    folder.fold(m, x)
    assert folder.report.folded == (name == 'view')


def test_strides_of_an_axis_of_size_one():
    last = torch.randn(2, 1, 8, 8).double().contiguous(memory_format=torch.channels_last)
    for given in ((), (last,)):
        m = net(lambda m, x: (z := m.bn(m.conv(x)).relu())*z.stride(1), conv=conv(1, 1), bn=bn(1))
        new = BN_Folder().fold(m, *given)
        assert norms(new) and difference(m(last), new(last)).relative < 1e-12


@pytest.mark.parametrize('asks', [lambda z: z.detach()*2 if z.requires_grad else z, lambda z: z*(1 + z.is_leaf)])
def test_what_asks_for_a_gradient(asks):
    "A frozen convolution has none for a BatchNorm that is trained, as in a fastai body that is frozen"
    for frozen in (False, True):
        for example in ((), (x,)):
            m = net(lambda m, x: asks(m.bn(m.conv(x))), conv=conv().requires_grad_(not frozen), bn=bn())
            new = BN_Folder().fold(m, *example)
            assert bool(norms(new)) == frozen and difference(m(x).detach(), new(x).detach()).relative < 1e-12


def test_folding_twice_changes_nothing():
    new, _ = fold(net(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=bn()), x)
    again, report = fold(new, x)
    assert len(report) == 0 and all(torch.equal(a, b) for a, b in zip(new.parameters(), again.parameters()))


@pytest.mark.parametrize('forward', [lambda m, x: m.bn(y) if isinstance(m.bn, nn.BatchNorm2d) and (y := m.conv(x)) is not None else m.conv(x)*2, lambda m, x: m.bn(m.conv(x)) * m.bn.num_features,
                                     lambda m, x: m.bn(m.conv(x)) if m.conv.bias is None else m.bn(m.conv(x))*2])
@pytest.mark.parametrize('example', [False, True])
def test_a_forward_that_looks_at_its_layers_is_found_out(forward, example):
    m = net(forward, conv=conv(bias=False), bn=bn())
    before = snapshot(m)
    for inplace in (False, True):
        with pytest.raises(FoldError): BN_Folder().fold(m, *([x] if example else []), inplace=inplace)
        assert_untouched(m, before)


def test_held_by_a_closure():
    m = net(lambda m, x: m.act(m.conv(x)), conv=conv(), bn=bn())
    m.act = lambda x: m.bn(x)
    for example in ((), (x,)):
        with pytest.raises(FoldError): BN_Folder().fold(m, *example)


@pytest.mark.parametrize('example', [False, True])
def test_a_flag_is_tried_both_ways(example):
    "What a flag that the example does not set would return is read by the caller"
    class Flag(nn.Module):
        def __init__(self): super().__init__(); self.conv, self.bn = conv(), bn()
        def forward(self, x, features=False): return (self.bn(c), c) if (c := self.conv(x)) is not None and features else self.bn(c)
    model = randomise(Flag())
    new, report = fold(model, x, example=example)
    assert norms(new) and all(torch.equal(a, b) for a, b in zip(model(x, features=True), new(x, features=True)))


def test_what_is_empty_on_the_example():
    "A part that is empty for one image has readers for two"
    def forward(m, x):
        y = m.conv(x)
        return m.bn(y[:1]).sum() + (y[1:]*2).sum()
    new, report = fold(net(forward, conv=conv(), bn=bn()), x[:1], inputs=[(x,), (x[:2],)])
    assert norms(new)


def only_tensors(x): return x if type(x) is torch.Tensor else x.relu()
def by_way_of(x): return only_tensors(x)
def if_callable(x): return x.relu() if callable(x) else x
@functools.singledispatch
def by_kind(x): return x.relu()
@by_kind.register(torch.Tensor)
def _(x): return x
def in_a_list(x): return [o if type(o) is torch.Tensor else o.relu() for o in [x]][0]

kind_of = type
def by_another_name(x): return x if kind_of(x) is torch.Tensor else x.relu()

@pytest.mark.parametrize('helper', [only_tensors, by_way_of, if_callable, by_kind, in_a_list, by_another_name])
def test_a_helper_that_asks_for_the_type(helper):
    "A stand-in would be taken for something else; with an example there is none"
    model = net(lambda m, x: m.bn(helper(m.conv(x))), conv=conv(), bn=bn())
    assert 'it asks `' in fold(model, x, example=False)[1]['bn'].why
    assert fold(model, x)[1]['bn'].folded


is_a = isinstance
def by_a_copy_of_isinstance(x): return x if is_a(x, torch.Tensor) else x.relu()
def by_overrides(x): return x.relu() if torch.overrides.has_torch_function_unary(x) else x
def by_its_history(x): return x.relu() if x.grad_fn is not None else x
def by_identity(x, seen=[]): return x if [x][0] is x and type(seen) is list else x.relu()
utilities = types.ModuleType('utilities')
utilities.by_overrides = by_overrides
def in_a_module(x): return utilities.by_overrides(x)

@pytest.mark.parametrize('helper', [by_a_copy_of_isinstance, by_overrides, by_its_history, by_identity, in_a_module])
def test_a_helper_that_asks_what_a_stand_in_cannot_answer(helper):
    model = net(lambda m, x: m.bn(helper(m.conv(x))), conv=conv(), bn=bn())
    why = fold(model, x, example=False)[1]['bn'].why
    assert 'it asks `' in why or 'it c' in why
    fold(model, x)


@pytest.mark.parametrize('forward', [lambda m, x: m.block[0](m.block(x)) if len(range(x.shape[-1])) > 6 else m.block(x), lambda m, x: getattr(m.block, '0')(m.block(x)) if len(range(x.shape[-1])) > 6 else m.block(x)])
def test_a_parent_that_reaches_past_its_child(forward):
    "and that can't be followed: what it does for another input is not known"
    model = net(forward, block=nn.Sequential(conv(), bn()))
    assert 'may use `block.1` as well' in fold(model, x, inputs=[(torch.randn(2, 4, 8, 8).double(),)])[1]['block.1'].why
    twin = net(lambda m, x: m.block(m.block(x)) if len(range(x.shape[-1])) > 6 else m.block(x), block=nn.Sequential(conv(), bn()))
    assert fold(twin, x, inputs=[(torch.randn(2, 4, 8, 8).double(),)])[1]['block.1'].folded


def test_a_forward_that_looks_at_its_layers_on_another_way():
    "The example does not show it, the code does"
    model = net(lambda m, x: m.bn(m.conv(x))*2 if x.shape[0] > 4 and isinstance(m.bn, nn.BatchNorm2d) else m.bn(m.conv(x)), conv=conv(), bn=bn())
    with pytest.raises(FoldError, match='takes another way'): BN_Folder().fold(model, x)


is_bn = lambda m: isinstance(m.bn, nn.BatchNorm2d)
looks = dict( # the same operations, with something else
    at_another_value=lambda m, x: (y := m.bn(m.conv(x)), (y.relu(), y.neg())[is_bn(m)])[1],
    in_another_way=lambda m, x: F.interpolate(m.bn(m.conv(x)), scale_factor=2, mode='nearest' if is_bn(m) else 'bicubic'),
    in_another_type=lambda m, x: m.bn(m.conv(x)).to(torch.float64 if is_bn(m) else torch.float32),
    by_another_name=lambda m, x: m.bn(m.conv(x)).sum(**{'dim' if is_bn(m) else 'keepdim': 1}),
    in_another_order=lambda m, x: m.bn(m.conv(x))[(..., 0) if is_bn(m) else (0, ...)],
    with_another_weight=lambda m, x: F.conv2d(m.bn(m.conv(x)), m.a.weight if is_bn(m) else m.b.weight),
    with_another_constant=lambda m, x: m.bn(m.conv(x))*(torch.arange(6.) if is_bn(m) else torch.arange(6.).flip(0)),
    under_another_key=lambda m, x: {'out' if is_bn(m) else 'aux': m.bn(m.conv(x))},
    in_another_field=lambda m, x: Outputs(y := m.bn(m.conv(x)), y.relu()) if is_bn(m) else Outputs((y := m.bn(m.conv(x))).relu(), y),
    as_a_list=lambda m, x: (list if is_bn(m) else tuple)([m.bn(m.conv(x))]),
    with_nothing_besides=lambda m, x: (y := m.bn(m.conv(x)), *([None] if is_bn(m) else [])),
    with_another_number=lambda m, x: m.bn(m.conv(x))*(2 if is_bn(m) else 3),
)

@pytest.mark.parametrize('name', looks)
def test_a_forward_that_looks_at_its_layers(name):
    model = net(looks[name], conv=conv(), bn=bn(), a=conv(), b=conv())
    with pytest.raises(FoldError, match='takes another way'): BN_Folder().fold(model)
    twin = net(lambda m, x: F.conv2d(m.bn(m.conv(x)), m.a.weight).relu(), conv=conv(), bn=bn(), a=conv())
    assert fold(twin, x, example=False)[1]['bn'].folded


def in_its_place(m, x, y=None): return m.bn(m.conv(x) if y is None else y)
def left_out(m, x, skip=False): return m.bn(x if skip else m.conv(x))
def behind_it(m, x, y=None):
    z = m.bn(x)
    return m.conv(z if y is None else y)
def any_number(m, *xs): return m.bn(m.conv(xs[0])) if len(xs) == 1 else m.bn(xs[1])
def by_name(m, x, **more): return m.conv(x) if more.get('raw') else m.bn(m.conv(x))
def many_optional(m, x, a=None, b=None, c=None, d=None, e=None, f=None): return m.bn(m.conv(x)) if a is None else m.conv(x)*a
def from_a_dict(m, batch): return m.conv(batch['x']) if batch.get('mask') is None else m.bn(m.conv(batch['x']))
def a_list(m, x): return [m.conv(o) for o in x] if isinstance(x, (list, tuple)) else m.bn(m.conv(x))
def one_of_a_list(m, xs): return m.bn(m.conv(xs[0])) if xs[1] is None else m.conv(xs[0])
def a_size_in_a_set(m, x): return m.conv(x) if x.shape[0] in {5} else m.bn(m.conv(x))
def a_size_in_a_text(m, x): return m.conv(x) if str(x.shape[0]) == '5' else m.bn(m.conv(x))
def an_attribute_by_size(m, x): return getattr(m, f'h{x.shape[0]}', m.bn)(m.conv(x))
def other_padding(m, x): m.conv.padding = (1, 1) if x.shape[0] > 3 else (0, 0); return m.conv(m.bn(x))
many = torch.randn(5, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
other_calls = {f: ((x,), (many,)) for f in (a_size_in_a_set, a_size_in_a_text, an_attribute_by_size, other_padding)} | {
    in_its_place: ((x,), (x, x.flip(0))), left_out: ((x,), (x, True)), behind_it: ((x,), (x, x.flip(0))), any_number: ((x,), (x, x.flip(0))), by_name: ((x,), (x,)), many_optional: ((x,), (x, 2.)),
    from_a_dict: ((dict(x=x, mask=x),), (dict(x=x),)), a_list: ((x,), ([x, x],)), one_of_a_list: (([x, None],), ([x, x],))}

@pytest.mark.parametrize('forward', other_calls, ids=lambda f: f.__name__)
def test_a_call_that_goes_another_way(forward):
    "The example is one way of calling it; for another, the BatchNorm has no layer beside it, or another"
    example, other = other_calls[forward]
    model = net(forward, conv=conv(), bn=bn(), h5=nn.Identity())
    for xs in ((), example):
        new = BN_Folder().fold(model, *xs)
        for args, kwargs in ((example, {}), (other, dict(raw=True) if forward is by_name else {})): assert difference(run(model, args, kwargs), run(new, args, kwargs)).relative < 1e-12


def test_a_hook_that_uses_what_is_inside():
    "Without an example, nothing tells what a hook does with its module"
    model = net(lambda m, x: m.block(x), block=nn.Sequential(conv(), bn()))
    model.block.register_forward_hook(lambda m, args, out: out + m[1](args[0]))
    for xs in ((), (x,)): assert difference(run(model, (x,), {}), run(BN_Folder().fold(model, *xs), (x,), {})).relative < 1e-12


def by_a_hook(m, x, y=None):
    c = m.conv(x)
    return c + m.head(y) if y is None else m.bn(c)

def test_a_hook_that_gives_an_input():
    "A layer that is called on nothing fails, unless a hook finds it something"
    model = net(by_a_hook, conv=conv(), bn=bn(), head=conv())
    model.head.register_forward_pre_hook(lambda m, args: (x[:1],) if args[0] is None else args)
    for xs in ((), (x, x)):
        new = BN_Folder().fold(model, *xs)
        for args in ((x,), (x, x)): assert difference(run(model, args, {}), run(new, args, {})).relative < 1e-12


class Reaches(nn.Module):
    "Can't be followed, and reaches a layer that it does not hold as modules do"
    def forward(self, x):
        try: return self.ref.it(x)
        except TypeError: return x

@pytest.mark.parametrize('layer, why', [('conv', 'is also read by `op`'), ('bn', 'may use `bn` as well')])
def test_a_child_that_reaches_a_layer_of_its_parent(layer, why):
    model = net(lambda m, x: m.bn(m.conv(x)) + m.op(x), conv=conv(), bn=bn(), op=Reaches())
    model.op.ref = Cache()
    model.op.ref.it = getattr(model, layer)
    assert why in fold(model, x, example=False)[1]['bn'].why
    model.op.ref.it = nn.Identity()
    assert fold(model, x, example=False)[1]['bn'].folded


class Cache:
    "Keeps what it is given"
kept = []

def test_what_a_trace_leaves_behind():
    "In an object of the model's own, or in a list of its module, it leaves nothing"
    def cached(m, x):
        m.cache.value = m.conv(x)
        return m.bn(m.cache.value)
    model = net(cached, conv=conv(), bn=bn())
    model.cache = Cache()
    for inplace in (False, True):
        BN_Folder().fold(model, inplace=inplace)
        assert vars(model.cache) == {}
    def listed(m, x):
        y = m.bn(m.conv(x))
        if kept: y = y + kept[-1].mean()
        kept.append(y)
        return y
    model = net(listed, conv=conv(), bn=bn())
    new = BN_Folder().fold(model)
    assert kept == []
    for m in (model, new): m.outs = [run(m, (i,), {}) for i in (x, x*2)], kept.clear()
    assert difference(model.outs, new.outs).relative < 1e-12


def train_it(m, x): m.bn.train(); return m.bn(m.conv(x))
def train_it_and_back(m, x):
    m.bn.training = True
    y = m.bn(m.conv(x))
    m.bn.training = False
    return y

@pytest.mark.parametrize('example', [False, True])
@pytest.mark.parametrize('forward', [train_it, train_it_and_back])
def test_a_batchnorm_that_forward_switches_to_training(forward, example):
    "The mode counts in which it is called, not the one it is found in before and after"
    model = net(forward, conv=conv(), bn=bn())
    assert 'uses those of the batch' in fold(model, x, example=example)[1]['bn'].why


class NormAct(nn.BatchNorm2d):
    "Normalises and activates, as timm's does"
    def __init__(self, c, *acts): super().__init__(c); self.acts = len(acts); [self.add_module(f'act{i}', a) for i, a in enumerate(acts)]
    def forward(self, x):
        x = super().forward(x)
        for i in range(self.acts): x = getattr(self, f'act{i}')(x)
        return x


def norm_act(*acts, forward=lambda m, x: m.bn(m.conv(x))): return net(forward, conv=conv(), bn=NormAct(4, *acts))


@pytest.mark.parametrize('example', [True, False])
@pytest.mark.parametrize('inplace', [False, True])
@pytest.mark.parametrize('act', [nn.ReLU(), nn.ReLU(inplace=True), nn.SiLU(), nn.Hardtanh(-.2, .3), nn.GELU('tanh')], ids=repr)
def test_an_activation_takes_the_place_of_its_batchnorm(act, inplace, example):
    "and is called at no more cost than any other"
    model = norm_act(act)
    want, before, keys = run(model, (x,), {}), snapshot(model), [n for n in model.state_dict() if not n.startswith('bn.')]
    new = BN_Folder().fold(model, *[x]*example, inplace=inplace)
    assert type(new.bn) is type(act) and repr(new.bn) == repr(act) and new.bn is not act and not new.bn.training and not new.bn._modules
    assert [*new.state_dict()] == keys and difference(want, run(new, (x,), {})).relative < 1e-13
    if not inplace: assert_untouched(model, before)
    assert BN_Folder().fold(new, x).bn is not new.bn # again: there is nothing left to fold


def shared_activation():
    act = nn.ReLU()
    return net(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=NormAct(4, act), unused=NormAct(4, act))


@pytest.mark.parametrize('model', [
    lambda: norm_act(nn.PReLU()), # its weight keeps its name
    lambda: norm_act(hooked(nn.ReLU())),
    lambda: norm_act(nn.Sequential(nn.ReLU())),
    lambda: norm_act(nn.ReLU(), nn.Tanh()),
    shared_activation,
])
def test_what_holds_something_keeps_its_own_place(model):
    new, report = fold((model := model()), x)
    assert report['bn'].folded and type(new.bn) is nn.Sequential and [*new.bn._modules] == [n for n in model.bn._modules]


def test_code_that_asks_for_the_activation_of_a_batchnorm():
    model = norm_act(nn.ReLU(), forward=lambda m, x: m.bn(m.conv(x))*(3 if m.bn.act0.inplace else 2))
    for example in (True, False):
        new, report = fold(model, x, example=example)
        assert report['bn'].folded and new.bn.act0.inplace is False # it is where it was


def test_an_activation_that_is_held_besides():
    act = nn.ReLU()
    for example in (True, False):
        model = net(lambda m, x: m.bag[0](m.bn(m.conv(x)) - .1), conv=conv(), bn=NormAct(4, act))
        model.bag = [act]
        new, report = fold(model, x, example=example)
        assert report['bn'].folded and new.bag[0] is new.bn.act0


def asks_for_a_list(m, x): y = m.conv(x); return m.bn(y[0] if type(y) is list else y)
def asks_for_containers(m, x): y = m.conv(x); return m.bn(y[0] if type(y) in (list, tuple) else y)
def asks_for_another(m, x): y = m.conv(x); return m.bn(y if type(y) is torch.Tensor else y.relu())
def asks_twice(m, x): y = m.conv(x); return m.bn(y.relu() if type(y) is list or type(y) is torch.Tensor else y)
def asks_of_its_input(m, x): return m.bn(m.conv(x[0] if type(x) is list else x))


class Forward(nn.Module):
    "Has a `forward` of a module's own code, with its own globals"
    def __init__(self, forward): super().__init__(); self.conv, self.bn = conv(), bn(); type(self).forward = forward
def with_forward(forward): return randomise(type('Forward', (Forward,), {})(forward)).double()


@pytest.mark.parametrize('forward, why', [(asks_for_a_list, ''), (asks_for_containers, ''), (asks_for_another, 'it asks `type`'), (asks_twice, 'it asks `type`'), (asks_of_its_input, 'it asks what kind of input it is given')])
def test_type_is_answered_for_containers_alone(forward, why):
    "A value that was computed is no list; whether it is a `Tensor` or of a subclass is not known, nor what an input is"
    for _ in range(2): # what a trace puts into the globals is gone again
        report = fold(with_forward(forward), x, example=False)[1]
        assert why in report['bn'].why and report['bn'].folded == (not why) and 'type' not in globals()
    assert why or fold(with_forward(forward), x)[1]['bn'].folded


@pytest.mark.parametrize('forward, channels, folded', [
    (lambda m, x: torch.cat([m.bn(m.conv(c)) for c in m.first(x).chunk(2, dim=1)], 1), 8, True),
    (lambda m, x: torch.cat([m.bn(m.conv(c)) for c in torch.chunk(F.silu(m.first(x)).tanh(), 2, 1)], 1), 8, True),
    (lambda m, x: torch.cat([m.bn(m.conv(c)) for c in torch.chunk(m.first(x).flip(1), 2, 1)], 1), 8, False), # behind anything but a layer or an activation the number is not known
    (lambda m, x: torch.cat([m.bn(m.conv(F.pad(c, (0, 0, 0, 0, 0, 4 - c.shape[1])))) for c in m.first(x).chunk(4, dim=1)], 1), 5, False), # there are three
    (lambda m, x: torch.cat([m.bn(m.conv(c)) for c in x.chunk(1, dim=1)], 1), 4, False),
    (lambda m, x: torch.cat([m.bn(m.conv(c)) for c in m.first(x).chunk(1, dim=0)], 1), 4, False)])
def test_loops_over_chunks(forward, channels, folded):
    model = net(forward, first=conv(o=channels), conv=conv(), bn=bn())
    row = fold(model, x, example=False)[1]['bn']
    assert row.folded == folded and (folded or 'it loops over its input' in row.why)
    fold(model, x)


def test_a_loop_over_the_sizes_of_what_many_things_come_to():
    def forward(m, x):
        y = m.conv(x)
        for _ in range(60): y = y + y.sigmoid()*.1 # 2**60 ways back
        return m.bn(m.other(doubled(y)))
    assert fold(net(forward, conv=conv(), other=conv(), bn=bn()), x, example=False)[1]['bn'].folded


def doubled(y): return F.interpolate(y, size=tuple(2*s for s in y.shape[2:]))


@pytest.mark.parametrize('forward, folded', [
    (lambda m, x: m.bn(doubled(m.conv(x))), True),
    (lambda m, x: m.bn(m.conv(doubled(F.avg_pool2d(m.other(x).relu(), 2) + 1))), True),
    (lambda m, x: m.bn(m.conv(doubled(x))), False), # an input may have any number of axes
    (lambda m, x: m.bn(m.conv(doubled(m.other(x).flatten(2).unsqueeze(2)))), False)]) # not every operation is known
def test_loops_over_sizes(forward, folded):
    model = net(forward, conv=conv(), other=conv(), bn=bn())
    row = fold(model, x, example=False, inputs=[(torch.randn(1, 4, 8, 10).double(),)])[1]['bn']
    assert row.folded == folded and (folded or 'it loops over its input' in row.why or 'stands between' in row.why)
    fold(model, x)


class Two(nn.Module):
    "Gives a tuple, and can't be followed"
    def forward(self, y): return (y, y) if float(y.abs().max()) >= 0 else (y,)


@pytest.mark.parametrize('forward', [
    lambda m, x: (lambda y: y*2 if type(y.chunk(2, 1)) is tuple else m.bn(y))(m.conv(x)),
    lambda m, x: (lambda y: y*2 if isinstance(y.chunk(2, 1), tuple) else m.bn(y))(m.conv(x)),
    lambda m, x: (lambda y: y*2 if torch.Tensor in (type(y), list, tuple) else m.bn(y))(m.conv(x)),
    lambda m, x: (lambda y: y*2 if (type(y), list)[0] is torch.Tensor else m.bn(y))(m.conv(x)),
    lambda m, x: (lambda y: y*2 if y.contiguous() is y else m.bn(y))(m.conv(x)),
    lambda m, x: (lambda y: y*2 if operator.is_(y.contiguous(), y) else m.bn(y))(m.conv(x)),
    lambda m, x: (lambda y: y*2 if builtins.type(y) == torch.Tensor else m.bn(y))(m.conv(x)),
    lambda m, x: (lambda y: y[0]*2 if isinstance(y, tuple) else m.bn(y))(m.two(m.conv(x)))])
def test_what_may_be_no_tensor(forward):
    fold(net(forward, conv=conv(), bn=bn(), two=Two()), x, example=False)


def by_hand(m, x): return m.b.conv(x)
class ConvNorm(nn.Module):
    def __init__(self): super().__init__(); self.conv, self.bn = conv(), bn()
    def forward(self, x): return self.bn(self.conv(x))


def far(x): return float(x.abs().max()) > 1e3
class Parent(nn.Module):
    def __init__(self): super().__init__(); self.b = ConvNorm(); self.l = nn.ModuleList([self.b]); self.d = nn.ModuleDict({'k': self.b})


@pytest.mark.parametrize('forward, kept', [
    (lambda m, x: m.l[0].conv(x) if far(x) else m.b(x), True),
    (lambda m, x: [b.conv for b in m.l][-1](x) if far(x) else m.b(x), True),
    (lambda m, x: m.d['k'].conv(x) if far(x) else m.b(x), True),
    (lambda m, x: by_hand(m, x) if far(x) else m.b(x), True),
    (lambda m, x: m.b.__getattr__('conv')(x) if far(x) else m.b(x), True),
    (lambda m, x: m.l[0](x) if far(x) else m.b(x), False)])
def test_a_parent_that_reaches_into_its_children_on_another_way(forward, kept):
    "and that can't be followed: the example shows one way alone"
    model = randomise(type('Author', (Parent,), dict(forward=forward))()).double()
    assert fold(model, x, inputs=[(x*1e4,)])[1]['b.bn'].folded == (not kept)


def test_dicts_whose_keys_are_layers_and_weights():
    model = net(lambda m, x: m.bn(m.conv(x))*m.gains.get(m.conv, 1.)*m.gains.get(m.conv.weight, 1.), conv=conv(), bn=bn())
    model.gains = {model.conv: 2., model.conv.weight: 3.}
    for example in (True, False): assert fold(model, x, example=example)[1]['bn'].folded


def test_a_batchnorm_inside_of_another():
    model = net(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=NormAct(4, NormAct(4, nn.ReLU())))
    for inplace in (False, True):
        bn = BN_Folder()
        want = run(model, (x,), {})
        assert difference(want, run(bn.fold(model, x, inplace=inplace), (x,), {})).relative < 1e-12 and bn.report.folded == 2


def none_where_it_fails(m, x):
    try: return m(x)
    except ValueError: return x
def none_where_anything_fails(m, x):
    try: return m(x)
    except: return x
def suppressing(m, x):
    with contextlib.suppress(ValueError): return m(x)
    return x
def cleaning_up(m, x):
    try: return m(x)
    finally: x = None


@pytest.mark.parametrize('example', [True, False])
@pytest.mark.parametrize('helper, folds', [(none_where_it_fails, False), (none_where_anything_fails, False), (suppressing, False), (cleaning_up, sys.version_info >= (3, 11))])
def test_helpers_that_catch_what_a_batchnorm_raises(helper, folds, example):
    "as of an image without a batch, which a convolution takes and a `BatchNorm2d` does not"
    model = net(lambda m, x: helper(m.bn, m.conv(x)), conv=conv(), bn=bn())
    assert fold(model, x, inputs=[(x[0],)] if not folds else [], example=example)[1]['bn'].folded == folds


def in_tokens(x): return rearrange(x, 'b c h w -> b (h w) c')
patterned = dict(
    by_name=lambda m, x: m.lin(rearrange(m.bn(m.conv(x)), 'b c h w -> b (h w) c')),
    by_the_package=lambda m, x: m.lin(einops.rearrange(m.bn(m.conv(x)), pattern='b c h w -> b (h w) c')),
    by_a_helper=lambda m, x: m.lin(in_tokens(m.bn(m.conv(x)))),
    with_sizes=lambda m, x: einops.einsum(y := m.bn(m.conv(x)), einops.repeat(einops.reduce(y, 'b c h w -> c', 'mean'), 'c -> b c', b=x.shape[0]), 'b c h w, b c -> b h w'),
    of_several=lambda m, x: rearrange([m.bn(m.conv(x)), x], 'n b c h w -> b (n c) h w'),
    loop_over_what_comes_of_it=lambda m, x: m.lin(y := rearrange(m.bn(m.conv(x)), 'b c h w -> b (h w) c')).reshape([*y.shape, 1]),
    before_it=lambda m, x: m.bn(rearrange(m.conv(x), 'b (g c) h w -> b (c g) h w', g=2)))


@pytest.mark.parametrize('example', [True, False])
@pytest.mark.parametrize('name', patterned)
def test_einops(name, example):
    model = net(patterned[name], conv=conv(), bn=bn(), lin=lin())
    assert fold(model, x, inputs=[(x[:2, :, :4],)], example=example)[1]['bn'].folded == (example or name != 'before_it')
    assert einops.rearrange is rearrange is einops.einops.rearrange


class Normed(nn.Conv2d):
    "As detectron2 has it: a convolution with a norm and an activation of its own"
    def __init__(self, *args, norm=None, activation=None, **kwargs): super().__init__(*args, bias=False, **kwargs); self.norm, self.activation = norm, activation
    def forward(self, x):
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None: x = self.norm(x)
        return x if self.activation is None else self.activation(x)
class Unbiased(Normed):
    "uses its bias no more once it has one"
    def forward(self, x):
        x = F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
        return self.norm(x)


@pytest.mark.parametrize('kind, folds', [(Normed, 2), (Unbiased, 0)])
def test_a_layer_with_a_norm_inside(kind, folds):
    "whether it uses the bias it gains is tried on a copy without numbers, its norm and all; no hook of it runs"
    model, seen = randomise(nn.Sequential(kind(4, 8, 3, norm=bn(8), activation=F.relu), kind(8, 4, 3, norm=bn()))), []
    model[0].norm.register_forward_hook(lambda m, args, out: seen.append(out.device.type))
    for example in ((), (x,)): assert BN_Folder().plan(model, *example).folded == (folds and 1)
    assert 'meta' not in seen
    model[0].norm._forward_hooks.clear()
    for example in (False, True): assert fold(model, x, example=example)[1].folded == folds


class Looks(nn.Module):
    "A block of an author's, which asks its BatchNorm for a number"
    def __init__(self): super().__init__(); self.conv, self.bn = conv(), bn()
    def forward(self, x): return self.bn(self.conv(x))/self.bn.num_features


@pytest.mark.parametrize('example', [False, True])
@pytest.mark.parametrize('inplace', [False, True])
def test_a_batchnorm_that_is_looked_at_is_kept_and_the_others_fold(example, inplace):
    block = lambda: nn.Sequential(conv(), bn(), nn.ReLU())
    model = randomise(nn.Sequential(block(), Looks(), block(), Looks(), block())).double().eval()
    want, folder = model(x), BN_Folder()
    new = folder.fold(model, *([x] if example else []), inplace=inplace)
    assert norms(new) == ['1.bn', '3.bn'] and folder.report['3.bn'].why == "the model's code looks at it"
    assert torch.allclose(new(x), want, rtol=1e-12)


def by_a_text(m, xs):
    kind = type(xs).__name__
    return m.parts[f'of{len(xs)}'](m.conv(torch.stack(xs).mean(0)))
def by_a_slice(m, xs):
    kind = type(xs).__name__
    return nn.Sequential(*[*m.parts.values()][len(xs):])(m.conv(torch.stack(xs).mean(0)))

@pytest.mark.parametrize('forward', [by_a_text, by_a_slice])
def test_a_part_that_is_looked_up(forward):
    "by how many pictures there are"
    for n in range(1, 3):
        model = net(forward, conv=conv(), parts=nn.ModuleDict(dict(of1=nn.Sequential(bn(), nn.ReLU()), of2=nn.ReLU())))
        new = BN_Folder().fold(model, [x]*n)
        for k in range(1, 3): assert difference(run(model, ([x]*k,), {}), run(new, ([x]*k,), {})).relative < 1e-12


class Frozen(nn.Module):
    "A BatchNorm that is written out, whose `forward` may use a number of its input"
    def __init__(self, forward, c=4):
        super().__init__()
        self.how, self.eps = forward, 1e-3
        for n in ('weight', 'bias', 'running_mean', 'running_var'): self.register_buffer(n, torch.rand(c) + .5)
    def forward(self, x): return self.how(self, x)
    def affine(self, eps=1.):
        w = self.weight*(self.running_var + self.eps*eps).rsqrt()
        return w.view(1, -1, 1, 1), (self.bias - self.running_mean*w).view(1, -1, 1, 1)
def aspect(x): return x.shape[-1]/x.shape[-2]
def plainly(x, s, t): return x*s + t
def of_a_dtype(x, s, t): return x*s.to(x.dtype) + t.to(x.dtype)
def by_aspect(x, s, t): return x*(s*aspect(x)) + t
def by_alpha(x, s, t): return torch.add(x*s, t, alpha=aspect(x))
def by_keyword(x, s, t): return torch.mul(x, other=s*aspect(x)) + t
def written(f): return lambda m, x: f(x, *m.affine())
def by_eps(m, x): return plainly(x, *m.affine(aspect(x)**9))
def in_the_call(m, x): return F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, False, 0., m.eps*aspect(x)**9)
frozen = {f.__name__: written(f) for f in (plainly, of_a_dtype, by_aspect, by_alpha, by_keyword)} | dict(by_eps=by_eps, in_the_call=in_the_call)


@pytest.mark.parametrize('example', [False, True])
@pytest.mark.parametrize('name', frozen)
def test_a_written_out_batchnorm_with_a_number_of_its_input(name, example):
    model = randomise(nn.Sequential(conv(), Frozen(frozen[name])))
    assert BN_Folder().plan(model, *([x] if example else [])).folded == (name in ('plainly', 'of_a_dtype'))
    new = BN_Folder().fold(model, *([x] if example else []))
    for given in (x, x[..., :3]): assert torch.allclose(model(given), new(given), rtol=1e-12)


def for_batches(m, x): return F.conv2d(x, m.weight) if x.shape[0] == 1 else F.conv2d(x, m.weight, m.bias)
def for_images(m, x): return F.conv2d(x.to(m.weight.dtype)/255, m.weight) if x.dtype == torch.uint8 else F.conv2d(x, m.weight, m.bias)
def for_batches_if_any(m, x): return F.conv2d(x, m.weight) if m.bias is None else F.conv2d(x, m.weight, m.bias if x.shape[0] > 1 else None)
def and_more(m, x): return F.conv2d(x, m.weight, m.bias) if m.bias is None else F.conv2d(x, m.weight, m.bias)*2
def as_told(m, x): return F.conv2d(x, m.weight) if getattr(m, 'one', False) else F.conv2d(x, m.weight, m.bias)
def padded(m, x): return F.conv2d(F.pad(x, (0, 1, 0, 1)) if x.shape[2] % 2 else x, m.weight, m.bias)
def telling(m, x):
    m.conv.one = x.shape[0] == 1
    return m.bn(m.conv(x))


@pytest.mark.parametrize('example', [False, True])
@pytest.mark.parametrize('forward', [for_batches, for_images, for_batches_if_any, and_more, as_told, padded])
def test_a_gained_bias_is_used_in_every_way(forward, example):
    kind = type('Own', (nn.Conv2d,), dict(forward=forward))
    model = net(telling if forward is as_told else lambda m, x: m.bn(m.conv(x)), conv=kind(4, 4, 2, bias=False), bn=bn())
    folder = BN_Folder()
    new = folder.fold(model, *([x] if example else []))
    assert folder.report.folded == (forward is padded) and (forward is padded or 'may not use the bias' in folder.report['bn'].why)
    for given in (x, x[:1], (x[:1]*50).abs().to(torch.uint8)) if forward is for_images else (x, x[:1]): assert torch.allclose(model(given), new(given), rtol=1e-12)


@torch.library.custom_op('fasterai_twins::fill', mutates_args=('into',))
def fill(x: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    into.fill_(1.)
    return x.clone()
def positive(x): return x.sigmoid()*2.
def out_of_another(m, x):
    into = m.other(x)
    y = m.bn(torch.mul(m.first(x), 2., out=into))
    into.add_(1.)
    return m.conv(y)
def by_out(m, x):
    y = m.bn(a := positive(x))
    torch.add(x, 1., out=a)
    return m.conv(y)
def by_two_names(m, x):
    y, other = m.bn(a := positive(x)), m.other(x)
    torch.sort(other, 1, out=(a, torch.empty(0, dtype=torch.long)))
    return m.conv(y)
def by_another_library(m, x):
    y = m.bn(a := positive(x))
    fill(x, a)
    return m.conv(y)
def by_name_alone(m, x):
    y = m.bn(torch.permute(input=positive(x), dims=(0, 1, 3, 2)))
    x.mul_(1.)
    return m.conv(y)
def into_something_else(m, x):
    y, other = m.bn(positive(x)), m.other(x)
    torch.add(x, 1., out=other)
    return m.conv(y)


@pytest.mark.parametrize('example', [False, True])
@pytest.mark.parametrize('forward', [out_of_another, by_out, by_two_names, by_another_library, by_name_alone, into_something_else])
def test_what_an_operation_writes_into(forward, example):
    model = net(forward, first=conv(), other=conv(), bn=bn(), conv=conv(k=1))
    _, report = fold(model, x.clone(), example=example)
    assert report.folded == (forward is into_something_else)


@torch.overrides.wrap_torch_function(lambda x: (x,))
def contiguous(x): return F.relu(x)
@torch.overrides.wrap_torch_function(lambda x: (x,))
def size(x): return F.relu(x)
@torch.overrides.wrap_torch_function(lambda x: (x,))
def normalised(x): return x.add_(1.)
def and_writes(m, x):
    y = m.bn(a := positive(x))
    normalised(a)
    return m.conv(y)
foreign = dict(a_function=lambda m, x: m.bn(contiguous(m.conv(x))), called_as_a_number=lambda m, x: m.bn(size(m.conv(x))), a_method=lambda m, x: m.bn(m.conv(x).interpolate(2)), an_attribute=lambda m, x: m.bn(m.conv(x).mH),
               after=lambda m, x: m.conv(contiguous(m.bn(positive(x)))), and_writes=and_writes)


@pytest.mark.parametrize('example', [False, True])
@pytest.mark.parametrize('name', foreign)
def test_what_is_called_like_an_operation(name, example, monkeypatch):
    monkeypatch.setattr(torch.Tensor, 'interpolate', lambda x, n: F.interpolate(x, scale_factor=n)**2, raising=False)
    monkeypatch.setattr(torch.Tensor, 'mH', property(lambda x: x.mT.relu()))
    model = net(foreign[name], conv=conv(k=1), bn=bn())
    assert not fold(model, x, example=example)[1].folded


class Unfollowed(nn.Module):
    "Holds a layer that is no part of the model"
    def __init__(self): super().__init__(); self.hidden = [conv(k=1).double()]
    def forward(self, x): return torch.relu(self.hidden[0](x))


@pytest.mark.parametrize('example', [False, True])
@pytest.mark.parametrize('name', ['interpolate', 'relu', 'cat', 'T', 'mT', 'phi', 'scale', 'batch_norm', 'conv2d', 'zeros_like', 'shape', 'Interpolate'])
def test_a_module_whose_class_is_called_like_an_operation(name, example):
    kind = type(name, (Unfollowed,), {})
    assert not fold(net(lambda m, x: m.bn(m.up(m.conv(x))), conv=conv(), up=kind(), bn=bn()), x, example=example)[1].folded
    assert not fold(net(lambda m, x: m.conv(m.up(m.bn(positive(x)))), conv=conv(k=1), up=kind(), bn=bn()), x, example=example)[1].folded


def test_a_module_that_is_called_like_an_operation():
    "in its parent: how many axes it gives is not known"
    class Flat(Unfollowed):
        def forward(self, x): return self.hidden[0](x).flatten(2)
    model = net(lambda m, x: m.bn(y) if len(tuple((y := m.last(m.relu(m.conv(x)))).shape[2:])) == 1 else y, conv=conv(), relu=Flat(), last=nn.Conv1d(4, 4, 1), bn=bn1())
    for example in (False, True): fold(model, x, example=example)


@pytest.mark.parametrize('forward, calls', [(lambda m, x, o: m.bn(m.conv(x).mean(0, keepdim=o)), [(flat[:4, :, None].expand(4, 4, 4), True), (flat[:4, :, None].expand(4, 4, 4), False)]),
                                            (lambda m, x, o: m.bn(m.lin(m.conv(x).mean(2)).expand(o.shape)), [(flat[..., None], flat), (flat[:4, :, None], flat[:4])]),
                                            (lambda m, x, o: m.bn(m.lin(m.conv(x).mean(2)).expand(size=o)), [(flat[..., None], (5, 4)), (flat[:4, :, None], (4, 4))])])
def test_an_argument_that_is_not_known(forward, calls):
    "is no `True`, and no single size"
    model = net(forward, conv=nn.Conv1d(4, 4, 1), lin=lin(), bn=bn1())
    for example in ((), *calls):
        new = BN_Folder().fold(model, *example)
        for given in calls: assert torch.allclose(model(*given), new(*given), rtol=1e-12)


class Spread(nn.Module):
    "A Linear whose bias `F.linear` spreads over its channels"
    def __init__(self, *shape): super().__init__(); self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(*shape))
    def forward(self, x): return F.linear(x, self.weight, self.bias)
def with_one_bias():
    layer = lin()
    layer.bias = nn.Parameter(torch.ones(1))
    return layer
class OneRow(nn.Module):
    def __init__(self): super().__init__(); self.weight = nn.Parameter(torch.randn(4))
    def forward(self, x): return F.linear(x, self.weight)
class OneWeight(Frozen):
    def __init__(self): super().__init__(frozen['plainly']); self.weight = torch.ones(1)


@pytest.mark.parametrize('make', [lambda: Spread(4), lambda: Spread(1), lambda: Spread(()), lambda: Spread(5, 4), with_one_bias, lambda: nn.Sequential(bn1(), OneRow(), nn.Unflatten(0, (5, 1)), nn.Linear(1, 4))])
@pytest.mark.parametrize('series', [False, True])
def test_a_bias_that_is_spread_over_the_channels(make, series):
    model = randomise(nn.Sequential(make(), bn1(), lin()))
    folder = BN_Folder(series=series)
    new = folder.fold(model, flat)
    assert torch.allclose(model(flat), new(flat), rtol=1e-12) and (make().__class__ is not Spread or folder.report.folded == 1)


def test_a_written_out_batchnorm_with_one_weight_for_all_channels():
    for example in (False, True): assert not fold(nn.Sequential(conv(), OneWeight()).double().eval(), x, example=example)[1].folded
