"Sizes that agree on the example by chance, and not on another call: each was once folded, wrongly. Beside each what stays the same at every size, and folds."
import math, operator

import pytest, torch
import torch.nn.functional as F
from torch import nn

from fasterai.fold.sizes import _changes, _on_cpu
from fasterai.misc.bn_folding import BN_Folder
from helpers import net, randomise
from test_ways import bn, conv, folded


def images(*size): return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
def one_place(m, x):
    y = F.avg_pool2d(m.conv(x), 8)
    return m.bn(y.reshape(-1, y.shape[1], 1, 1))
def columns(m, x):
    y = m.bn(F.avg_pool2d(m.conv(x).relu(), 8))
    return m.fc(y.view(y.shape[0], -1)[:, :4])
def tokens(m, x):
    y = m.fc(x)
    n, l, c = y.shape
    return m.bn(y.flatten(1).reshape(n, c, 1, -1))
def squeezed(m, x): return m.bn1(m.fc(x).transpose(1, 2).squeeze())
def batch_and_length(m, x):
    y = m.fc(x)
    n, l, c = y.shape
    return m.bn1(y.permute(1, 2, 0).reshape(n, c, -1))
def batch_and_width(m, x):
    y = m.conv(x)
    n, c, h, w = y.shape
    return m.bn1(y.permute(3, 1, 2, 0).reshape(n, c, -1))
def width_first(m, x):
    y = m.conv(x)
    n, c, h, w = y.shape
    return m.bn1(y.reshape(w, c, h*n))
def square(m, x):
    y = m.conv(x)
    n, c, h, w = y.shape
    return m.bn(y.transpose(1, 2).reshape(-1, c, w, w))
def all_ones(m, x):
    y = m.conv1(x)
    n, c, h = y.shape
    return m.bn(y.transpose(0, 2).reshape(n, c, -1, 1))
def squeezed_first(m, x): return m.bn1(m.conv1(x).squeeze(0))
def square_of_tokens(m, x):
    y = m.fc(x)
    n, l, c = y.shape
    side = int(l**.5)
    return m.bn(y.transpose(1, 2).reshape(-1, c, side, side))
def only_if_square(m, x):
    y = F.avg_pool2d(m.conv(x), 4)
    n, c, h, w = y.shape
    return m.bn1(y.reshape(w, -1, w))
def by_numel(m, x):
    y = F.avg_pool2d(m.conv(x), 4)
    n, c, h, w = y.shape
    return m.bn(y.reshape(w, h*w, y.numel()//c//n, -1))
def tiles(m, x):
    y = m.conv(x)
    n, c, h, w = y.shape
    k = -(-w//256)
    return m.bn(y.reshape(n*k, c, h, w//k))
def rounded_tiles(m, x):
    y = m.conv(x)
    n, c, h, w = y.shape
    k = math.ceil(w/256)
    return m.bn(y.view(n*k, y.size(1), h, -1))
def batches(m, x):
    y = m.conv(x)
    n, c, h, w = y.shape
    k = (n + 63)//64
    return m.bn(y.reshape(n//k, c, h*k, w))

@pytest.mark.parametrize('forward, sizes', [
    (one_place, [(2, 4, 8, 8), (2, 4, 16, 16)]), (columns, [(2, 4, 8, 8), (2, 4, 16, 16)]), (tokens, [(2, 1, 4), (2, 5, 4)]), (squeezed, [(2, 4, 4), (1, 4, 4)]),
    (batch_and_length, [(2, 2, 4), (2, 3, 4)]), (batch_and_width, [(4, 4, 8, 4), (4, 4, 8, 6)]), (width_first, [(4, 4, 8, 4), (4, 4, 8, 6)]), (square, [(2, 4, 8, 8), (2, 4, 16, 4)]),
    (squeezed_first, [(2, 4, 8), (1, 4, 4)]), (square_of_tokens, [(1, 64, 4), (2, 2, 4)]), (all_ones, [(1, 4, 1), (2, 4, 4)]), (only_if_square, [(1, 4, 4, 4), (1, 4, 8, 8)]), (by_numel, [(2, 4, 8, 8), (4, 4, 8, 8)]),
    (tiles, [(1, 4, 4, 4), (1, 4, 4, 512)]), (rounded_tiles, [(1, 4, 4, 4), (1, 4, 4, 512)]), (batches, [(1, 4, 4, 4), (128, 4, 4, 4)])], ids=lambda o: getattr(o, '__name__', ''))
def test_sizes_that_agree_by_chance(forward, sizes):
    calls = [(images(*s),) for s in sizes]
    for example in ((), *calls):
        model = net(forward, conv=conv(), conv1=nn.Conv1d(4, 4, 1), fc=nn.Linear(4, 4), bn=bn(), bn1=nn.BatchNorm1d(4))
        folded(model, example, calls)


def of_a_square(m, x):
    assert x.shape[2] == x.shape[3], 'square pictures'
    return m.bn1(F.avg_pool2d(m.conv(x), 8).view(-1, 4))
def of_what_fits_its_turn(m, x): return m.bn1(F.avg_pool2d(m.conv(x) + m.conv(x.transpose(2, 3)), 8).view(-1, 4))
def with_strides(m, x):
    if x.shape[2] != x.shape[3]: raise ValueError('square pictures')
    return m.bn1(m.deep(x).view(-1, 4))
def of_a_cube(m, x):
    if len({*x.shape[2:]}) > 1: raise ValueError('cubes')
    return m.bn1(F.avg_pool3d(m.conv3(x), 4).view(-1, 4))
def with_a_coarse_one(m, x, low): return m.bn1(F.avg_pool2d(F.avg_pool2d(m.conv(x), 2) + low, 8).view(-1, 4))
def with_a_mask(m, x, mask): return m.bn1(F.avg_pool1d(m.conv1(x)*mask[:, None], 32).view(-1, 4))
def with_tokens(m, x, tokens): return m.bn1(F.avg_pool1d(m.conv(x).flatten(2) + m.fc(tokens).transpose(1, 2), 64).reshape(-1, 4))

@pytest.mark.parametrize('forward, sizes', [
    (of_a_square, [[(2, 4, 8, 8)], [(2, 4, 16, 16)]]), (of_what_fits_its_turn, [[(2, 4, 8, 8)], [(2, 4, 32, 32)]]), (with_strides, [[(2, 4, 16, 16)], [(2, 4, 32, 32)]]), (of_a_cube, [[(2, 4, 4, 4, 4)], [(2, 4, 8, 8, 8)]]),
    (with_a_coarse_one, [[(2, 4, 16, 16), (2, 4, 8, 8)], [(2, 4, 32, 32), (2, 4, 16, 16)]]), (with_a_mask, [[(2, 4, 32), (2, 32)], [(2, 4, 64), (2, 64)]]), (with_tokens, [[(2, 4, 8, 8), (2, 64, 4)], [(2, 4, 16, 8), (2, 128, 4)]])], ids=lambda o: getattr(o, '__name__', ''))
def test_sizes_that_grow_together(forward, sizes):
    calls = [tuple(images(*s) for s in call) for call in sizes]
    for example in ((), calls[0]):
        model = net(forward, conv=conv(), conv1=nn.Conv1d(4, 4, 1), conv3=nn.Conv3d(4, 4, 3, padding=1), fc=nn.Linear(4, 4), deep=nn.Sequential(*[conv(stride=2) for _ in range(4)]), bn1=nn.BatchNorm1d(4))
        assert not folded(model, example, calls).folded


def pooled(y, n): return F.avg_pool2d(y, n).view(-1, 4)
def with_patches(m, x, tokens): return m.bn1(F.avg_pool1d(F.avg_pool2d(m.conv(x), 2).flatten(2) + m.fc(tokens).transpose(1, 2), 16).reshape(-1, 4))
def with_a_class_token(m, x, tokens): return m.bn1(F.avg_pool1d(m.conv(x).flatten(2) + m.fc(tokens[:, 1:]).transpose(1, 2), 16).reshape(-1, 4))
def of_odd_sizes(m, x): return m.bn1(pooled(m.conv(x + F.conv_transpose2d(F.conv2d(x, m.conv.weight, stride=2, padding=1), m.conv.weight, stride=2, padding=1)), 16))
def of_a_table(m, x): return m.bn1(F.avg_pool2d(m.conv(x + m.table[:, :, :x.shape[2], :x.shape[3]]), 8, 4).view(-1, 4))
def of_crops(m, x, context): return m.bn1(pooled(m.conv(x) + context.repeat_interleave(4, 0)[..., None, None] + m.conv(x.transpose(2, 3)), 16))
def by_name(m, x): return m.bn1(F.avg_pool2d(m.conv(x + m.table[:, :, :x.shape[2], :x.shape[3]]), 8, 4).reshape(-1, m.conv.out_channels))

def placed(m, x): return F.avg_pool2d(m.conv(x + m.table[:, :, :x.shape[2], :x.shape[3]]), 8, 4)
def cut(m, x): return m.bn1(placed(m, x).view(x.shape[0], -1)[:, :4])
def narrowed(m, x): return m.bn1(placed(m, x).reshape(x.shape[0], -1).narrow(1, 0, 4))
def flattened(m, x): return m.bn1(placed(m, x).flatten(1)[:, :4])

@pytest.mark.parametrize('forward, sizes', [
    *((f, [[(2, 4, 8, 8)], [(2, 4, 12, 12)]]) for f in (cut, narrowed, flattened)), (with_patches, [[(2, 4, 8, 8), (2, 16, 4)], [(2, 4, 16, 16), (2, 64, 4)]]), (with_a_class_token, [[(2, 4, 4, 4), (2, 17, 4)], [(2, 4, 8, 8), (2, 65, 4)]]), (of_odd_sizes, [[(1, 4, 17, 17)], [(1, 4, 33, 33)]]),
    (of_a_table, [[(2, 4, 8, 8)], [(2, 4, 12, 12)]]), (by_name, [[(2, 4, 8, 8)], [(2, 4, 12, 12)]]), (of_crops, [[(8, 4, 16, 16), (2, 4)], [(8, 4, 32, 32), (2, 4)]])], ids=lambda o: getattr(o, '__name__', ''))
def test_an_axis_of_size_one_that_never_had_more(forward, sizes):
    "is not left out: no run says what it is at a size that was not tried"
    calls = [tuple(images(*s) for s in call) for call in sizes]
    model = net(forward, conv=conv(), fc=nn.Linear(4, 4), bn1=nn.BatchNorm1d(4))
    model.register_buffer('table', images(1, 4, 12, 12))
    assert not folded(model, calls[0], calls).folded


def one_place_at_every_size(m, x): return m.bn1(F.adaptive_avg_pool2d(m.conv(x), 1).view(-1, 4))
def mean_of_all_places(m, x): return m.bn1(m.pointwise(m.conv(x).mean((2, 3), keepdim=True)).reshape(-1, 4))
def channels_last(m, x): return m.bn1(F.avg_pool2d(m.conv(x), 8).view(x.shape[0], -1))
@pytest.mark.parametrize('forward', [one_place_at_every_size, mean_of_all_places, channels_last])
def test_an_axis_that_is_of_size_one_for_sure(forward):
    def fixed(m, x):
        if x.shape[2:] != (8, 8): raise ValueError('one size alone')
        return forward(m, x)
    calls = [(images(2, 4, 8, 8),), (images(3, 4, 8, 8),)]
    assert folded(net(fixed, conv=conv(), pointwise=nn.Conv2d(4, 4, 1), bn1=nn.BatchNorm1d(4)), calls[0], calls).folded == 1


def test_what_runs_elsewhere_is_tried_in_a_copy_on_the_cpu():
    model, known = net(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=bn()), frozenset()
    new, (args, kwargs) = _on_cpu(model, ((x := images(2, 4, 8, 8),), {}), known)
    assert new is not model and new.conv.weight is not model.conv.weight and torch.equal(new(*args), model(x)) and not kwargs
    assert _on_cpu(net(lambda m, x: m.conv(x.cuda(9)), conv=conv()), ((x,), {}), known) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('forward', [one_place, of_a_square])
def test_sizes_that_agree_by_chance_on_a_gpu(forward):
    model = net(forward, conv=conv(), bn=bn(), bn1=nn.BatchNorm1d(4)).cuda()
    small, large = images(2, 4, 8, 8).cuda(), images(2, 4, 16, 16).cuda()
    assert not folded(model, (small,), [(small,), (large,)]).folded


def rows_of_a_constant(m, x): return m.fc9(m.bn(m.valid(x).relu()).view(-1, 36))
def groups_of_a_constant(m, x): return m.fc9(m.bn(m.valid(x).relu()).reshape(x.shape[0], -1, 36))
def rows_by_columns(m, x): return m.fc9(m.bn(m.valid(x).relu()).transpose(1, 2).flatten(1))
def columns_first(m, x): return m.fc9(m.bn(m.valid(x).relu()).permute(0, 3, 1, 2).reshape(len(x), 36))
def clips(m, x):
    b, t = x.shape[:2]
    if t not in (1, 10): raise ValueError('an image, or a clip of ten')
    y = m.pool(m.valid(x.flatten(0, 1))).flatten(1)
    return m.fc(m.bn1(m.one(y.view(b, t, -1).transpose(1, 2)).relu()).reshape(-1, 4))
@pytest.mark.parametrize('forward, sizes', [
    (rows_of_a_constant, [(2, 4, 5, 5), (2, 4, 8, 5)]), (groups_of_a_constant, [(2, 4, 5, 5), (2, 4, 8, 5)]), (rows_by_columns, [(2, 4, 5, 5), (2, 4, 11, 3)]), (columns_first, [(2, 4, 5, 5), (2, 4, 3, 11)]),
    (clips, [(2, 1, 4, 5, 5), (2, 10, 4, 5, 5)])], ids=lambda o: getattr(o, '__name__', ''))
def test_sizes_of_a_feature_map_that_no_size_of_the_input_hits(forward, sizes):
    "a multiple of the features, or as many of them in another shape"
    calls = [(images(*s),) for s in sizes]
    layers = dict(valid=nn.Conv2d(4, 4, 3), bn=bn(), bn1=nn.BatchNorm1d(4), one=nn.Conv1d(4, 4, 1), pool=nn.AdaptiveAvgPool2d(1), fc=nn.Linear(4, 4), fc9=nn.Linear(36, 4))
    assert not folded(net(forward, **layers), calls[0], calls).folded


@pytest.mark.parametrize('flatten', [lambda y: y.flatten(1), lambda y: y.view(y.size(0), -1), lambda y: y.view(-1, y.shape[1]*y.shape[2]*y.shape[3]), nn.Flatten()])
def test_a_reshape_that_takes_every_size(flatten):
    "but the layer behind it does not"
    calls = [(images(2, 4, 5, 5),), (images(3, 4, 5, 5),)]
    assert folded(net(lambda m, x: m.fc9(flatten(m.bn(m.valid(x).relu()))), valid=nn.Conv2d(4, 4, 3), bn=bn(), fc9=nn.Linear(36, 4)), calls[0], calls).folded == 1


class Shuffle(nn.Module):
    def __init__(self): super().__init__(); self.bn, self.fc = nn.BatchNorm1d(12), nn.Conv1d(12, 2, 1)
    def forward(self, x, k): return self.fc(torch.channel_shuffle(self.bn(x.relu()), k))


def test_a_number_that_was_read_off_a_tensor_and_handed_on():
    model = net(lambda m, x, k: m.inner(m.stem(x), k.item()), stem=nn.Conv1d(3, 12, 1), inner=Shuffle())
    calls = [(images(2, 3, 5), torch.tensor(k)) for k in (2, 3)]
    assert not folded(model, calls[0], calls).folded


def flat(m, x):
    y = m.conv(x)
    n, c, h, w = y.shape
    return m.bn1(y.view(n, c, h*w))
def back(m, x):
    y = m.fc(x)
    n, l, c = y.shape
    return m.bn(y.transpose(1, 2).reshape(n, c, l, 1))
def shuffled(m, x):
    y = m.bn(m.conv(x))
    n, c, h, w = y.shape
    return m.fc(y.view(n, 2, c//2, h, w).transpose(1, 2).reshape(n, c, h, w).mean((2, 3)))
def of_half_its_channels(m, x):
    y = m.conv(x)
    return m.bn1(y.reshape(len(y), 2, y.shape[1]//2, -1).flatten(1, 2))
def squeezed_place(m, x): return m.bn1(F.adaptive_avg_pool2d(m.conv(x), 1).squeeze(-1).squeeze(-1))
def heads(m, x):
    n, l, c = x.shape
    return m.bn1(m.fc(x).reshape(n, l, 2, c//2).permute(0, 2, 3, 1).flatten(1, 2))

@pytest.mark.parametrize('forward, sizes', [(flat, [(2, 4, 8, 8), (3, 4, 9, 7)]), (back, [(4, 4, 4), (3, 5, 4)]), (shuffled, [(4, 4, 4, 4), (1, 4, 5, 7)]), (squeezed_place, [(4, 4, 4, 4), (2, 4, 5, 5)]), (of_half_its_channels, [(2, 4, 8, 8), (3, 4, 9, 7)]), (heads, [(2, 4, 4), (3, 5, 4)])],
                         ids=lambda o: getattr(o, '__name__', ''))
def test_what_is_the_same_at_every_size_folds(forward, sizes):
    "also where sizes agree on the example"
    calls = [(images(*s),) for s in sizes]
    assert folded(net(forward, conv=conv(), fc=nn.Linear(4, 4), bn=bn(), bn1=nn.BatchNorm1d(4)), calls[0], calls).folded == 1


class Apart(nn.Module):
    "A comprehension makes a value for each; who takes one of them is another function"
    def __init__(self): super().__init__(); self.conv, self.bn = conv(), bn()
    def features(self, images): return [self.conv(i) for i in images]
    def head(self, ys): return torch.cat([self.bn(ys[0]), *ys[1:]])
    def forward(self, images): return self.head(self.features(images))
def first(ys, bn): return torch.cat([bn(ys[0]), *ys[1:]])
class ByAFunction(Apart):
    def forward(self, images): return first(self.features(images), self.bn)

@pytest.mark.parametrize('kind', [Apart, ByAFunction])
def test_one_of_several_that_another_function_takes(kind):
    x = images(2, 4, 8, 8)
    for example in ((), ([x],), ([x, x],)): folded(randomise(kind()).double(), example, [([x],), ([x, x],)])


def stacked(batch): return torch.stack([*batch])
named = dict(
    submodule=(lambda m, b, o: m.bn(m.get_submodule(o)(stacked(b))), 'conv', 'one'), getter=(lambda m, b, o: m.bn(operator.attrgetter(o)(m)(stacked(b))), 'conv', 'one'),
    caller=(lambda m, b, o: m.bn(operator.methodcaller(o, stacked(b))(m)), 'conv', 'one'), default=(lambda m, b, o: m.bn({'a': m.conv, 'b': m.one}.setdefault(o, m.conv)(stacked(b))), 'a', 'b'),
    function=(lambda m, b, o: m.bn(o(m.conv(stacked(b)))), lambda y: y, lambda y: y.relu()), dtype=(lambda m, b, o: m.bn(m.conv(stacked(b)).to(o).double()), torch.float64, torch.bfloat16))

@pytest.mark.parametrize('way', named)
def test_a_name_or_a_function_in_the_input(way):
    forward, *given = named[way]
    batch = [*images(2, 4, 4, 4)]
    for o in given:
        model = net(forward, conv=conv(), one=nn.Conv2d(4, 4, 1), bn=bn())
        folded(model, (batch, o), [(batch, g) for g in given])


def test_a_way_of_its_own_for_one_size():
    def forward(m, x):
        if x.sum() > 1e9: return x
        y = m.conv(x)
        n, c, h, w = y.shape
        return m.bn1(y.view(n, c, h*w)) if x.shape == (2, 4, 8, 8) else y.view(n, c, h*w)
    model = net(forward, conv=conv(), bn1=nn.BatchNorm1d(4))
    folded(model, (images(2, 4, 8, 8),), [(images(2, 4, 8, 8),), (images(3, 4, 8, 8),)])


def test_nothing_but_the_batch_grows_on_a_gpu():
    "where an index that is too large for its table can't be caught"
    for shapes in ([(2, 3, 8, 8)], [(1, 3, 128, 131)], [(4, 64, 4)], [(2, 1, 1)], [(2, 3, 8, 8), (2, 5)]):
        until, besides, _ = _changes(shapes, grow=False)
        assert all(n <= shapes[i][d] for changes in (*until, *besides) for c in changes for (i, d), n in c.items() if d)


def test_an_example_with_an_empty_tensor():
    def forward(m, x, more):
        y = m.conv(x)
        n, c, h, w = y.shape
        return m.bn1(y.view(n, c, h*w)), more.sum(0)
    model = net(forward, conv=conv(), bn1=nn.BatchNorm1d(4))
    assert folded(model, (images(2, 4, 8, 8), images(0, 4)), [(images(2, 4, 8, 8), images(0, 4)), (images(3, 4, 5, 7), images(2, 4))]).folded == 1


@pytest.mark.parametrize('numbers', [True, False])
def test_runs_at_other_sizes_leave_nothing_behind(numbers):
    "nor does one that fails"
    def forward(m, x):
        m.seen.append(x)
        m.calls += 1
        if m.numbers: float(x.sum())
        y = m.conv(x)
        n, c, h, w = y.shape
        return m.bn1(y.view(n, c, h*w))
    model = net(forward, conv=conv(), bn1=nn.BatchNorm1d(4))
    model.seen, model.calls, model.numbers = [], 0, numbers
    new = BN_Folder().fold(model, images(2, 4, 8, 8))
    for m in (model, new): assert m.seen == [] and m.calls == 0 and not any(t.is_meta for t in m.state_dict().values())


class Windowed(nn.Module):
    "Takes signals whose frames come in windows, four numbers apart"
    def __init__(self): super().__init__(); self.conv, self.bn, self.fc = nn.Conv1d(2, 4, 1, stride=4), nn.BatchNorm1d(4), nn.Linear(20, 3)
    def forward(self, x):
        y = self.conv(x)
        if y.shape[-1] % 5: raise ValueError('five frames make a window')
        return self.fc(self.bn(y.relu()).reshape(-1, 20))

def test_a_model_that_takes_few_lengths():
    short, long = (torch.randn(2, 2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (17, 37))
    for example in ((), (short,), (long,)): folded(randomise(Windowed()).double(), example, [(short,), (long,)])


class Clips(nn.Module):
    "Frames of clips of seven as a batch: at one clip the axes are apart, and at two they mix"
    def __init__(self): super().__init__(); self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm1d(8), nn.Linear(8*49, 5)
    def forward(self, x): return self.fc(self.bn(self.conv(x).reshape(7, 8, -1)).relu().reshape(-1, 7, 8*49)).mean(1)

def test_a_batch_of_several_clips():
    clips = images(14, 3, 7, 7)
    for example in ((), (clips[:7],), (clips,)): folded(randomise(Clips()).double(), example, [(clips[:7],), (clips,)])
