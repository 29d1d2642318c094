"A choice made in one module that changes what happens in another: by what it is given, or by what is left behind."
import argparse, contextvars, random, threading, types

import einops, pytest, torch
import torch.nn.functional as F
from torch import nn

from fasterai.misc.bn_folding import BN_Folder
from helpers import net, randomise
from test_ways import bn, conv, folded, pair, x


class Outer(nn.Module):
    def __init__(self, inner, forward): super().__init__(); self.inner, self.way = inner, forward
    def forward(self, x, *flag): return self.way(self, x, *flag)


def outer(forward, inner): return randomise(type('Net', (nn.Module,), dict(forward=forward))()) if inner is None else randomise(_with(type('Net', (nn.Module,), dict(forward=forward))(), inner))
def _with(m, inner):
    m.inner = inner
    return m


def normed(m, x, flag): return m.bn(m.conv(x)) if flag else m.conv(x)
def activated(m, x, flag):
    y = m.conv(x)
    if flag: y = y.relu()
    return m.bn(y)
def padded(m, x, mode): return m.conv(F.pad(m.bn(x), (1, 1, 1, 1), mode=mode))
def given_out(m, x, flag=False):
    y = m.conv(x)
    return (m.bn(y), y) if flag else m.bn(y)
def by_an_attribute(m, x):
    y = m.conv(x)
    return m.bn(y.relu() if m.active else y)


def passed_on(m, x, flag=True): return m.inner(x, flag)
def by_its_size(m, x): return m.inner(x, True) if x.shape[-1] > 6 else m.inner(x, False)
def by_gradient(m, x): return m.inner(x, torch.is_grad_enabled())
def by_mode(m, x): return m.inner(x, 'reflect' if x.shape[-1] > 1 else 'constant')
def asked_for(m, x, flag=False): return m.inner(x, True) if flag else m.inner(x)
def sets(m, x, flag=False):
    m.inner.active = flag
    return m.inner(x)
def sets_by_size(m, x):
    m.inner.active = True if x.shape[0] > 2 else False
    return m.inner(x)
def of_several(m, x, flag=0): return m.inner(x, flag > 1)


large, small, one, many = (torch.randn(*size, dtype=torch.float64) for size in ((2, 4, 7, 7), (2, 4, 5, 5), (2, 4, 5, 1), (3, 4, 5, 5)))
told = [(passed_on, normed, [(small,), (small, False)]), (passed_on, activated, [(small, False), (small,)]), (by_its_size, activated, [(small,), (large,)]), (by_gradient, activated, [(small,)]),
        (by_mode, padded, [(small,), (one,)]), (asked_for, given_out, [(small,), (small, True)]), (sets, by_an_attribute, [(small,), (small, True)]), (sets_by_size, by_an_attribute, [(small,), (many,)]),
        (of_several, activated, [(small,), (small, 2)])]


@pytest.mark.parametrize('forward, within, calls', told, ids=lambda o: getattr(o, '__name__', ''))
def test_a_child_is_told_which_way_to_take(forward, within, calls):
    for example in ((), *calls):
        inner = pair(within)
        inner.active = False
        assert not folded(outer(forward, inner), example, calls).folded


def test_a_child_that_is_told_the_same_every_time_folds():
    for example in ((), (small,)): assert folded(outer(lambda m, x, flag=True: m.inner(x, False), pair(activated)), example, [(small,), (small, False)]).folded


class Padder(nn.Module):
    odd = False
    def forward(self, x):
        self.odd = False
        if x.shape[-1] % 2:
            self.odd = True
            x = F.pad(x, (0, 1))
        return x
class Collects(nn.Module):
    def forward(self, x, features):
        if x.shape[0] > 2: features.append(x)
        return x*1
class Counts(nn.Module):
    def __init__(self): super().__init__(); self.seen = {}
    def forward(self, x):
        self.seen['large'] = x.shape[0] > 2 and True
        if x.shape[0] > 2: self.seen['several'] = 1
        return x*1
class Hidden(Padder):
    "Can't be followed"
    def forward(self, x):
        for _ in range(int(x.shape[-1])): x = x*1
        return super().forward(x)


def reads_an_attribute(m, x):
    y = m.conv(m.inner(x))
    if m.inner.odd: y = y[..., :-1].relu()
    return m.bn(y)
def reads_a_list(m, x):
    features = []
    y = m.conv(m.inner(x, features))
    return m.bn(y if features else y.relu())
def reads_a_dict(m, x):
    y = m.conv(m.inner(x))
    return m.bn(y.relu() if 'several' in m.inner.seen else y)
SEEN = []
class Shares(nn.Module):
    "Writes into what another module holds, or has a name for, as well"
    def __init__(self, way): super().__init__(); self.way, self.log, self.context, self.options = way, [], types.SimpleNamespace(large=False), argparse.Namespace(large=False)
    def forward(self, x):
        if x.shape[0] > 2: self.way(self)
        return x*1
def logs(m): m.log.append(1)
def notes(m): m.context.large = True
def globally(m): SEEN.append(1)
def by_options(m): m.options.large = True
class Asks(nn.Module):
    def __init__(self, shares, way): super().__init__(); self.conv, self.bn, self.log, self.context, self.options, self.way = conv(), bn(), shares.log, shares.context, shares.options, way
    def forward(self, x): return self.bn(self.conv(x) if self.way(self) else self.conv(x).relu())
def seen_by_itself(m, x):
    y = m.conv(x)
    if x.shape[0] > 2: m.seen = True
    return m.bn(y if m.seen else y.relu())


@pytest.mark.parametrize('forward, inner, calls', [(reads_an_attribute, Padder, [(torch.randn(2, 4, 6, 6),), (small,)]), (reads_an_attribute, Hidden, [(torch.randn(2, 4, 6, 6),), (small,)]),
                                                   (reads_a_list, Collects, [(small,), (many,)]), (reads_a_list, Collects, [(many,), (small,)]), (reads_a_dict, Counts, [(small,), (many,)]), (seen_by_itself, nn.Identity, [(small,), (many,)])], ids=lambda o: getattr(o, '__name__', ''))
def test_a_child_leaves_something_behind_that_is_asked_for(forward, inner, calls):
    for example in ((), *calls[:1]):
        model = pair(forward)
        model.inner, model.seen = inner(), False
        folded(model, tuple(o.double() for o in example), [(o.double(),) for o, in calls])


@pytest.mark.parametrize('writes, asks', [(logs, lambda m: m.log), (notes, lambda m: m.context.large), (globally, lambda m: SEEN), (by_options, lambda m: m.options.large)])
def test_what_one_writes_another_asks_for(writes, asks):
    for example in ((), (small,), (many,)):
        shares = Shares(writes)
        model = randomise(nn.Sequential(shares, Asks(shares, asks)))
        new = BN_Folder().fold(model, *example)
        for given in (small, many):
            outs = []
            for m in (model, new):
                m[0].log.clear()
                SEEN.clear()
                m[0].context.large = m[0].options.large = False
                outs.append(m(given))
            assert torch.allclose(*outs)


def levels(m, xs): return [bn(m.conv(x)) for x, bn in zip(xs, m.bns)]
def last(m, xs):
    ys = [m.conv(x) for x in xs]
    ys[-1] = m.bn(ys[-1])
    return ys
def mapped(m, xs): return [m.bn(y) if i == 0 else y for i, y in enumerate(map(m.conv, xs))]
def first_of_mapped(m, xs):
    first, *rest = map(m.conv, xs)
    return m.bn(first), rest
def parts(m, xs):
    ys = [m.conv(p) for p in torch.cat(xs).split(2)]
    return torch.cat([m.bn(ys[0]), *ys[1:]])
def frames(m, xs):
    first, *rest = xs
    return m.bn(m.conv(first)), [m.conv(x) for x in rest]
def iterated(m, xs):
    xs = iter(xs)
    return m.bn(m.conv(next(xs))), [m.conv(x) for x in xs]
def chosen_by(y, name): return y.relu() if name == 'relu' else y
def kept_type(m, xs, name='none'): return m.bn(chosen_by(type(xs)([m.conv(x) for x in xs])[0], name))


@pytest.mark.parametrize('forward', [levels, last, mapped, first_of_mapped, parts, frames, iterated])
def test_a_list_with_more_in_it_than_the_example(forward):
    model = pair(forward)
    model.bns = nn.ModuleList([bn(), bn()])
    for example in ((), ([small],)): assert not folded(randomise(model), example, [([small],), ([small, small],)]).folded


def popped(m, xs):
    ys = [m.conv(x) for x in xs]
    return m.bn(ys.pop()), ys
def besides(m, xs): return m.bn(m.conv(xs[0])), [m.conv(x) for x in xs[1:]]


@pytest.mark.parametrize('forward', [popped, besides])
def test_one_of_several_is_taken(forward):
    for example in ((), ([small],)): assert not folded(pair(forward), example, [([small],), ([small, small],)]).folded


class Each(nn.Module):
    def __init__(self): super().__init__(); self.convs = nn.ModuleList([conv(), conv()])
    def forward(self, xs): return [layer(x) for layer, x in zip(self.convs, xs)]


@pytest.mark.parametrize('at', [0, -1])
def test_a_parent_takes_one_of_several(at):
    "which is that of another layer where there are more"
    def forward(m, xs):
        ys = m.each(xs)
        ys[at] = m.bn(ys[at])
        return ys
    model = pair(forward)
    model.each, model.at = Each(), at
    for example in ((), ([small],)): folded(randomise(model), example, [([small],), ([small, small],)])


def test_a_helper_chooses_by_a_name():
    for example in ((), ([small],)): assert not folded(pair(kept_type), example, [([small],), ([small], 'relu')]).folded


def test_a_head_for_each_of_a_list_folds():
    "each round knows nothing of the others, and what it calls is followed by itself"
    def heads(m, xs): return [head(x) for head, x in zip(m.heads, xs)]
    model = pair(heads)
    model.heads = nn.ModuleList([pair(lambda m, x: m.bn(m.conv(x))) for _ in range(2)])
    assert folded(randomise(model), ([small, small],), [([small, small],), ([small],)]).folded == 2


tokens, wide = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 3, 5, 5, dtype=torch.float64)
class Numbered(nn.Module):
    def __init__(self, way): super().__init__(); self.way, self.fc, self.bn, self.conv, self.wide = way, nn.Linear(3, 8), nn.BatchNorm1d(4), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
    def forward(self, x, k): return self.way(self, x, k)
def split_by(m, x, k):
    n, c, h, w = (y := m.conv(x)).shape
    return m.wide(y.view(n, k, c//k, h, w).transpose(1, 2).reshape(n, c, h, w))
numbered = dict(
    columns=(lambda m, x, k: m.bn(m.fc(x)[:, :, k:k+4].transpose(1, 2)), tokens, (0, 4)), added=(lambda m, x, k: m.wide(m.conv(x) + k), wide, (0, 1.)),
    shuffled=(lambda m, x, k: m.wide(F.channel_shuffle(m.conv(x), k)), wide, (2, 4)), split_by=(split_by, wide, (2, 4)),
    in_a_pattern=(lambda m, x, k: m.wide(einops.rearrange(m.conv(x), 'b (g c) h w -> b (c g) h w', g=k)), wide, (2, 4)),
    unflattened=(lambda m, x, k: m.wide(m.conv(x).unflatten(1, (k, -1)).transpose(1, 2).flatten(1, 2)), wide, (2, 4)))


@pytest.mark.parametrize('name', numbered)
def test_a_caller_gives_a_number(name):
    way, given, numbers = numbered[name]
    for example in ((), (given, numbers[0])): folded(randomise(Numbered(way)), example, [(given, k) for k in numbers])


def test_a_view_of_49_places():
    "in floats 49*(1/49) is less than 1"
    class Places(nn.Module):
        def __init__(self): super().__init__(); self.fc, self.bn = nn.Linear(3, 4), nn.BatchNorm2d(4)
        def forward(self, x): return self.bn(self.fc(x).view(2, 7, 7, 4).permute(0, 3, 1, 2))
    given = torch.randn(2, 49, 3, dtype=torch.float64)
    folded(randomise(Places()), (given,), [(given,)])


LARGE, LOCAL = contextvars.ContextVar('large', default=False), threading.local()
def by_context(m): LARGE.set(True)
def by_thread(m): LOCAL.large = True


@pytest.mark.parametrize('writes, asks', [(by_context, lambda m: LARGE.get()), (by_thread, lambda m: getattr(LOCAL, 'large', False))])
def test_a_variable_of_a_context_or_a_thread(writes, asks):
    "is nowhere to be put back, and may be another when the model runs"
    shares = Shares(writes)
    for example in ((), (small,), (many,)): assert not BN_Folder().plan(randomise(nn.Sequential(shares, Asks(shares, asks))), *example).folded


def handed_to_a_method(m, x, upto=False): return m.go(x, upto)
def of_its_own(m, x, upto=False):
    y = m.conv(x)
    return y if upto == m.names[0] else m.bn(y)
def one_of_its_own(m, x, upto=False):
    y = m.conv(x)
    return y if upto in m.names else m.bn(y)
def as_a_number(m, x, upto=False):
    y, n = m.conv(x), int(upto)
    return y if n > 2 else m.bn(y)
def under_another_name(m, x, upto=True):
    y, a = m.conv(x), upto
    return y if a is None else m.bn(y)
def in_a_closure(m, x, upto=False):
    y = m.conv(x)
    return (lambda: y if upto == 'conv' else m.bn(y))()
def go(m, x, upto):
    y = m.conv(x)
    return y if upto == 'conv' else m.bn(y)

@pytest.mark.parametrize('forward', [handed_to_a_method, of_its_own, one_of_its_own, as_a_number, under_another_name, in_a_closure])
@pytest.mark.parametrize('example', [(), (x,)], ids=['symbolic', 'example'])
def test_an_argument_that_is_more_than_a_flag(forward, example):
    "though its default is `True` or `False`"
    model = pair(forward)
    model.names, type(model).go = ('conv', 'bn'), go
    more = [x, 3] if forward is as_a_number else [x, None] if forward is under_another_name else [x, 'conv']
    assert not folded(model, example, [(x,), more]).folded


class Flagged(nn.Module):
    def __init__(self): super().__init__(); self.conv, self.bn = conv(), bn()
    def forward(self, x, clip=False, drop: bool = False): return clipped(F.dropout(self.bn(self.conv(x)), .5, training=drop) if not drop else x, clip=clip)
def clipped(x, clip): return x.clamp(-1, 1) if clip and x is not None else x
def test_a_flag_that_is_handed_on_is_one():
    model = net(lambda m, x, clip=False: m.inner(x, clip=clip), inner=Flagged())
    assert folded(model, (), [(x,), (x, True)]).folded == 1


class Object:
    "What stands for a method of a class, and is no function"
    def __init__(self, f): self.f = f
    def __get__(self, o, cls=None): return self if o is None else types.MethodType(self, o)
    def __call__(self, m, x): return self.f(m, x) + m.conv(x)
class CalledByAnObject(nn.Module):
    def __init__(self): super().__init__(); self.conv, self.bn = conv(), bn()
    @Object
    def __call__(self, x): return nn.Module.__call__(self, x)
    def forward(self, x): return self.bn(self.conv(x))
class ForwardIsAnObject(nn.Module):
    def __init__(self): super().__init__(); self.conv, self.bn = conv(), bn()
    @Object
    def forward(self, x): return self.bn(self.conv(x))
@pytest.mark.parametrize('kind', [CalledByAnObject, ForwardIsAnObject])
@pytest.mark.parametrize('example', [(), (x,)], ids=['symbolic', 'example'])
def test_a_method_that_is_an_object(kind, example): assert not folded(randomise(kind()), example, [(x,)]).folded


def asks_for_a_type(x): return x if type(x) is torch.Tensor else x[0]
def in_turn(m, x):
    x, m.i = asks_for_a_type(x), 1 - m.i
    return m.bn(m.wide(x).narrow(1, 4*m.i, 4))
def by_its_log(m, x):
    x = asks_for_a_type(x)
    m.log.append(1)
    return m.bn(m.wide(x).narrow(1, 4*(m.log.__len__() - 2), 4))
def by_chance(m, x): return m.bn(m.wide(asks_for_a_type(x)).narrow(1, random.getrandbits(1)*4, 4))
@pytest.mark.parametrize('forward', [in_turn, by_its_log, by_chance])
@pytest.mark.parametrize('example', [(), (x,)], ids=['symbolic', 'example'])
def test_code_that_cannot_be_followed_and_goes_by_what_it_left_or_draws(forward, example):
    model, folder = net(forward, wide=conv(8), bn=bn()), BN_Folder()
    model.i, model.log = 0, [1]
    folder.fold(model, *example)
    assert not folder.report.folded
