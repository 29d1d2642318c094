"Code that a `forward` comes to by way of objects, tables, and functions of functions; and what it must not be left with."
import abc, asyncio, collections.abc, concurrent.futures, functools, gc, inspect, itertools, operator, random, secrets, sys, types, typing
from dataclasses import dataclass

import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn

from fasterai.fold.held import reached
from fasterai.fold.verify import difference, run
from fasterai.misc.bn_folding import BN_Folder
from helpers import assert_untouched, fold, net, randomise, snapshot
from test_ways import bn, conv, folded, odd, pair, same, x


def tried(layer, x):
    try: return layer(x)
    except ValueError: return x
def plain(layer, x): return layer(x)
def deeper(n): return (lambda layer, x: deeper(n-1)(layer, x)) if n else tried
caught = tried
class Policy:
    def __init__(self, inner=None): self.inner = inner
    def tried(self, layer, x): return tried(layer, x)
    def __getitem__(self, name): return tried
    def __mul__(self, layer): return functools.partial(tried, layer)
    part = functools.partialmethod(lambda self, how, layer, x: how(layer, x), caught)
class Slotted:
    __slots__ = 'how',
    def __init__(self): self.how = tried
class Decorated:
    def __init__(self, f): self.f = f
    def __get__(self, o, cls): return functools.partial(self, o)
    def __call__(self, o, layer, x): return tried(layer, x)
class Tabled(nn.Module):
    table = {'a': [tried]}
    @Decorated
    def decorated(self, layer, x): return layer(x)
    def by_name(self, layer, x): return tried(layer, x)
def five(layer, x): return four(layer, x)
def four(layer, x): return three(layer, x)
def three(layer, x): return two(layer, x)
def two(layer, x): return one(layer, x)
def one(layer, x): return tried(layer, x)
policy, TABLE = Policy(), dict(a=dict(b=tried))
through = dict(
    held=lambda m, x: m.policy.tried(m.bn, m.conv(x)), inside=lambda m, x: m.policy.inner.tried(m.bn, m.conv(x)), item=lambda m, x: m.policy['a'](m.bn, m.conv(x)),
    operator=lambda m, x: (m.policy*m.bn)(m.conv(x)), part=lambda m, x: m.policy.part(m.bn, m.conv(x)), slots=lambda m, x: m.slotted.how(m.bn, m.conv(x)),
    dict_=lambda m, x: m.functions['a'](m.bn, m.conv(x)), table=lambda m, x: m.table['a'][0](m.bn, m.conv(x)), global_table=lambda m, x: TABLE['a']['b'](m.bn, m.conv(x)),
    global_object=lambda m, x: policy.tried(m.bn, m.conv(x)), decorated=lambda m, x: m.decorated(m.bn, m.conv(x)), five=lambda m, x: five(m.bn, m.conv(x)),
    closures=lambda m, x: deeper(6)(m.bn, m.conv(x)), by_name=lambda m, x: getattr(m, 'by_name')(m.bn, m.conv(x)), caller=lambda m, x: operator.methodcaller('tried', m.bn, m.conv(x))(m.policy),
    made=lambda m, x: Policy().tried(m.bn, m.conv(x)), in_a_list=lambda m, x: [f(m.bn, m.conv(x)) for f in m.several][0],
    computed=lambda m, x: getattr(m, 'by_' + m.name)(m.bn, m.conv(x)), computed_of_another=lambda m, x: getattr(m.policy, m.named)(m.bn, m.conv(x)))


@pytest.mark.parametrize('way', through)
def test_an_exception_caught_in_code_far_away(way, monkeypatch):
    "a BatchNorm raises on three axes, an identity does not; where nothing is caught, the same way to it folds"
    model = randomise(type('Net', (Tabled,), dict(forward=through[way]))())
    model.conv, model.bn, model.policy, model.slotted = conv(), bn(), Policy(Policy()), Slotted()
    model.functions, model.several, model.name, model.named = {'a': tried}, [tried], 'name', 'tried'
    randomise(model)
    for example in ((), (x,)): assert not folded(model, example, [(x,), (x[0],)]).folded
    monkeypatch.setattr(tried, '__code__', plain.__code__)
    for example in ((), (x,)): assert folded(model, example, [(x,)]).folded


class Edited(nn.Module):
    "as in a notebook, where a cell is run again, or a class is patched"
    def __init__(self): super().__init__(); self.conv, self.bn = conv(), bn()
    def forward(self, x): return helper(self.bn, self.conv(x))
class Layer(nn.Conv2d): pass
def helper(layer, x): return layer(x)
def patched(self, x): return tried(self.bn, self.conv(x))
def calls(self, x): return F.conv2d(x, self.weight, self.bias).relu()
edits = dict(forward=(Edited, 'forward', patched), defined_anew=(sys.modules[__name__], 'helper', tried), reloaded=(helper, '__code__', tried.__code__), called=(Layer, '__call__', calls))


@pytest.mark.parametrize('edit', edits)
def test_code_that_is_edited_between_two_folds(edit, monkeypatch):
    model = Edited()
    model.conv = Layer(4, 4, 3)
    randomise(model)
    assert folded(model, (), [(x,)]).folded
    monkeypatch.setattr(*edits[edit])
    for example in ((), (x,)): assert not folded(model, example, [(x,)]).folded


kinds = dict(a=type)
class Typed:
    of = type
asks = dict(
    table=lambda m, y: y if kinds['a'](y) is torch.Tensor else y.relu(), of_a_class=lambda m, y: y if Typed.of(y) is torch.Tensor else y.relu(),
    mapped=lambda m, y: y if [*map(type, [y])] == [torch.Tensor] else y.relu(), held=lambda m, y: y if m.kind['a'](y) is torch.Tensor else y.relu())


@pytest.mark.parametrize('way', asks)
def test_the_type_asked_by_way_of_something(way):
    model = net(lambda m, x: m.bn(asks[way](m, m.conv(x))), conv=conv(), bn=bn())
    model.kind = dict(a=type)
    for example in ((), (x,)): folded(model, example, [(x,)])


@typing.runtime_checkable
class Shaped(typing.Protocol):
    shape: object
class Sized(abc.ABC):
    @classmethod
    def __subclasshook__(cls, kind): return hasattr(kind, 'shape')
def by_its_attribute(m, x, skip): return m.bn(m.conv(x)) + skip if hasattr(skip, 'shape') else m.conv(x).relu()
def by_a_default(m, x, skip): return m.conv(x).relu() if getattr(skip, 'shape', None) is None else m.bn(m.conv(x)) + skip
def by_an_error(m, x, skip):
    try: skip.shape
    except AttributeError: return m.conv(x).relu()
    return m.bn(m.conv(x)) + skip
def by_a_protocol(m, x, skip): return m.bn(m.conv(x)) + skip if isinstance(skip, Shaped) else m.conv(x).relu()
def by_a_class(m, x, skip): return m.bn(m.conv(x)) + skip if isinstance(skip, Sized) else m.conv(x).relu()
def by_iteration(m, x, skip): return m.bn(m.conv(x)) + skip if isinstance(skip, collections.abc.Iterable) else m.conv(x).relu()
def by_a_local(m, x, skip): return m.conv(x).relu() if (given := skip) is None else m.bn(m.conv(x)) + given
def by_a_list(m, x, skip): return m.conv(x).relu() if [skip].count(None) else m.bn(m.conv(x)) + skip
def by_what_is_in(m, x, skip): return m.conv(x).relu() if None in (x, skip) else m.bn(m.conv(x)) + skip
def by_equality(m, x, skip): return m.conv(x).relu() if skip == None else m.bn(m.conv(x)) + skip # noqa
def by_the_filter(m, x, skip): return m.bn(m.conv(x)) + skip if [*filter(lambda o: o is not None, [skip])] else m.conv(x).relu()
def by_truth(m, x, skip): return m.bn(m.conv(x)) + skip if skip else m.conv(x).relu()
def by_or(m, x, skip): return m.bn(m.conv(x)) + (skip or x)
def by_match(m, x, skip):
    match skip:
        case None: return m.conv(x).relu()
        case _: return m.bn(m.conv(x)) + skip


@pytest.mark.parametrize('forward', [by_its_attribute, by_a_default, by_an_error, by_a_protocol, by_a_class, by_iteration, by_a_local, by_a_list, by_what_is_in, by_equality, by_the_filter, by_truth, by_or, by_match])
def test_an_argument_that_may_be_none(forward):
    "is asked for it in a roundabout way; the example is a call with a tensor"
    one = torch.ones(1, 4, 1, 1, dtype=torch.float64)[0, 0, 0, 0]
    for example in ((), (x, one)): folded(pair(forward), example, [(x, None), (x, one)])


class Own(torch.Tensor): pass
def by_a_subclass(m, x): return m.bn(m.conv(x).relu() if isinstance(x, Own) else m.conv(x))
def by_jit(m, x): return m.bn(m.conv(x).relu() if torch.jit.isinstance(x, list[torch.Tensor]) else m.conv(x))


def test_a_tensor_of_a_class_of_its_own():
    for example in ((), (x,)): folded(pair(by_a_subclass), example, [(x,), (x.as_subclass(Own),)])


class Late(nn.Module):
    "What it returns runs its layers, or not"
    def __init__(self, way): super().__init__(); self.block, self.way = pair(lambda m, x: m.bn(m.conv(x))), way
    def forward(self, x): return self.way(self, x)
def generated(m, x):
    yield m.block(x)
    yield m.block.conv(x).relu()
def lambdas(m, x): return lambda: m.block.conv(x) + m.block(x)
def partials(m, x): return functools.partial(lambda m, x: m.block.conv(x) + m.block(x), m, x)
def in_a_dict(m, x): return dict(more=lambda: m.block.conv(x) + m.block(x), out=m.block(x))
async def awaited(m, x): return m.block.conv(x) + m.block(x)
def mapped(m, x): return map(lambda f: f(x), [m.block, m.block.conv])
def bound(m, x): return m.block.conv.forward


@pytest.mark.parametrize('way', [generated, lambdas, partials, in_a_dict, awaited, mapped, bound])
def test_a_forward_that_runs_later(way):
    def given(out):
        if inspect.iscoroutine(out): return asyncio.new_event_loop().run_until_complete(out)
        if isinstance(out, dict): return given(out['more'])
        return out(x) if way is bound else out() if callable(out) else [*out]
    model = randomise(Late(way))
    want, new = given(model(x)), BN_Folder().fold(model)
    for a, b in zip(*((o if isinstance(o, list) else [o]) for o in (want, given(new(x))))): assert torch.allclose(a, b)


class Called(nn.Conv2d):
    def _call_impl(self, x): return super()._call_impl(x).relu()
class Wrapped(nn.Conv2d):
    def _wrapped_call_impl(self, x): return super()._wrapped_call_impl(x).relu()
class CalledNorm(nn.BatchNorm2d):
    def _call_impl(self, x): return super()._call_impl(x.relu())


@pytest.mark.parametrize('kind', [Called, Wrapped])
def test_a_layer_that_is_called_in_a_way_of_its_own(kind):
    for example in ((), (x,)):
        model = net(lambda m, x: m.bn(m.conv(x)), conv=kind(4, 4, 3), bn=bn())
        folded(model, example, [(x,)])
        folded(net(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=CalledNorm(4)), example, [(x,)])
        folded(nn.Sequential(model, bn()).double().eval(), example, [(x,)])


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.relu() if ctx.needs_input_grad[0] else x.clone()
    @staticmethod
    def backward(ctx, g): return g


def test_a_function_with_a_gradient_of_its_own():
    for example in ((), (x,)):
        model = net(lambda m, x: m.bn(Straight.apply(m.conv(x))), conv=conv(), bn=bn())
        with torch.enable_grad(): want = model(x)
        new = BN_Folder().fold(model, *example)
        with torch.enable_grad(): assert torch.allclose(want, new(x))


@dataclass
class Record:
    last: object = None
    more: object = None
class Frozen:
    __slots__ = 'last',
records, by_key = [Record()], {}
def remembers(x, memo={}):
    memo['last'] = x
    return x
def fills(x):
    by_key['last'] = x
    return x
@functools.lru_cache(None)
def halves(m): return m.conv.weight/2
def counter():
    n = 0
    def count(x):
        nonlocal n
        n += 1
        return x
    return count
def in_a_record(m, x):
    m.records[0].last = x
    return m.bn(m.conv(x))
def in_a_record_of_a_record(m, x):
    m.records[0].more.last = x
    return m.bn(m.conv(x))
def in_slots(m, x):
    m.slots.last = x
    return m.bn(m.conv(x))
def in_a_global_record(m, x):
    records[0].last = x
    return m.bn(m.conv(x))
def in_its_class(m, x):
    m.__class__.last = x
    return m.bn(m.conv(x))
def in_an_array(m, x):
    m.array[0] += 1
    return m.bn(m.conv(x))
keepers = dict(
    in_a_default=lambda m, x: m.bn(m.conv(remembers(x))), by_a_helper=lambda m, x: m.bn(m.conv(fills(x))), in_a_cache=lambda m, x: m.bn(m.conv(x)) + halves(m).mean(),
    in_a_closure=lambda m, x: m.bn(m.conv(m.count(x))), in_a_record=in_a_record, in_a_record_of_a_record=in_a_record_of_a_record, in_slots=in_slots,
    in_a_global_record=in_a_global_record, in_its_class=in_its_class, in_an_array=in_an_array)


@pytest.mark.parametrize('forward', keepers.values(), ids=keepers)
@pytest.mark.parametrize('example', [(), (x,)], ids=['without', 'with'])
def test_no_stand_in_is_left_anywhere(forward, example):
    model = pair(forward)
    model.records, model.slots, model.count, model.array = [Record(more=Record())], Frozen(), counter(), np.zeros(1)
    by_key.clear()
    halves.cache_clear()
    stand_ins = lambda: {id(o) for o in gc.get_objects() if issubclass(type(o), torch.fx.Proxy)}
    before = stand_ins() # those of a notebook
    new = BN_Folder().fold(model, *example)
    gc.collect()
    assert stand_ins() <= before
    same(model, new, [(x,), (odd,)])
    assert model.array == 0 and model.count.__closure__[0].cell_contents == 0 and not hasattr(model.slots, 'last')


async def later(layer, x): return layer(x)
def runs_a_loop(m, x): return m.bn(asyncio.run(later(m.conv, x)))
def in_a_thread(m, x):
    with concurrent.futures.ThreadPoolExecutor(1) as pool: return m.bn(pool.submit(m.conv, x).result())


@pytest.mark.parametrize('forward', [runs_a_loop, in_a_thread])
def test_a_loop_or_a_thread_of_its_own(forward):
    for example in ((), (x,)): folded(pair(forward), example, [(x,), (odd,)])
    assert asyncio.run(later(lambda o: o, 1)) == 1


def in_fx(m, x): return m.bn(m.conv(x).relu() if torch.fx._symbolic_trace.is_fx_tracing() else m.conv(x))
def by_dynamo(m, x): return m.bn(m.conv(x).relu() if torch._dynamo.is_compiling() else m.conv(x))
def by_utils(m, x): return m.bn(m.conv(x).relu() if torch._utils.is_compiling() else m.conv(x))
def any_autocast(m, x): return m.bn(m.conv(x).relu() if torch._C._is_any_autocast_enabled() else m.conv(x))
def by_system(m, x): return m.bn(m.conv(x).relu() if random.SystemRandom().random() < 2 else m.conv(x))
def by_a_new_one(m, x): return m.bn(m.conv(x).relu() if np.random.default_rng().random() < 2 else m.conv(x))
def by_secrets(m, x): return m.bn(m.conv(x).relu() if secrets.randbelow(9) < 20 else m.conv(x))
def by_torch(m, x): return m.bn(m.conv(x).relu() if torch.rand(1, generator=torch.Generator()).item() < 2 else m.conv(x))


@pytest.mark.parametrize('forward', [in_fx, by_dynamo, by_utils, any_autocast, by_system, by_a_new_one, by_secrets, by_torch])
def test_more_that_tells_how_it_is_run_or_draws(forward):
    for example in ((), (x,)): assert not BN_Folder().plan(pair(forward), *example).folded


class Chooser:
    def __call__(self, m, x, kw): return m.bn(m.conv(x)) if kw.get('n', 2) == 2 else m.conv(x)
    def of(self, kw): return [m for m in (self.m.conv, self.m.bn)][:kw['n']] if kw else [self.m.conv, self.m.bn]
def near(m, x, kw): return far(m, x, kw)
def far(m, x, kw): return m.bn(m.conv(x)) if kw.get('n', 2) == 2 else m.conv(x)
def runs(layers, x): return functools.reduce(lambda y, f: f(y), layers, x)
def in_turn(m, x, **kw):
    for f in itertools.islice((m.conv, m.bn), kw.get('n', 2)): x = f(x)
    return x
def through_a_stack(m, x, **kw):
    todo = [m.bn, m.conv]
    for _ in range(kw.get('n', 2)): x = todo.pop()(x)
    return x
def while_(m, x, **kw):
    n = 0
    while n < kw.get('n', 2): x, n = (m.conv, m.bn)[n](x), n+1
    return x
by_the_caller = dict(
    reduced=lambda m, x, **kw: functools.reduce(lambda y, f: f(y), [m.conv, m.bn][:kw.get('n', 2)], x), helper=lambda m, x, **kw: runs((m.conv, m.bn)[:kw.get('n', 2)], x),
    sliced=lambda m, x, **kw: m.net[:kw.get('n', 2)](x), by_a_text=lambda m, x, **kw: m.named[f"way{kw.get('n', 2)}"](x), by_a_sum=lambda m, x, **kw: m.named['way' + str(kw.get('n', 2))](x),
    policy=lambda m, x, **kw: m.policy(m, x, kw), method_of_a_policy=lambda m, x, **kw: runs(m.policy.of(kw), x), far=lambda m, x, **kw: near(m, x, kw), in_turn=in_turn, through_a_stack=through_a_stack, while_=while_,
    mapped=lambda m, x, **kw: [*itertools.accumulate([x, *(m.conv, m.bn)[:kw.get('n', 2)]], lambda y, f: f(y))][-1], item=lambda m, x, **kw: operator.itemgetter(kw.get('n', 2))({1: m.conv, 2: m.net})(x),
    get=lambda m, x, **kw: operator.attrgetter('net' if kw.get('n', 2) == 2 else 'conv')(m)(x), boolean=lambda m, x, **kw: m.conv(x) if kw.get('n', 2) < 2 else m.bn(m.conv(x)), or_=lambda m, x, **kw: (kw.get('n', 2) == 1 and m.conv or m.net)(x),
    tensor=lambda m, x, **kw: torch.stack([m.conv(x), m.bn(m.conv(x))])[kw.get('n', 2)-1], max_=lambda m, x, **kw: max((m.conv, 1), (m.net, kw.get('n', 2)-.5), key=lambda o: o[1])[0](x))


@pytest.mark.parametrize('way', by_the_caller)
def test_a_parent_that_cannot_be_followed_goes_by_what_it_is_given(way):
    c, b = conv(), bn()
    model = net(by_the_caller[way], conv=c, bn=b, net=nn.Sequential(c, b), named=nn.ModuleDict(dict(way1=nn.Sequential(c), way2=nn.Sequential(c, b))))
    model.policy = Chooser()
    model.policy.m = types.SimpleNamespace(conv=c, bn=b)
    new = BN_Folder().fold(model, x)
    for kw in ({}, dict(n=1), dict(n=2)): assert difference(run(model, (x,), kw), run(new, (x,), kw)).relative < 1e-12
    new = BN_Folder().fold(model, x, n=1)
    for kw in ({}, dict(n=1), dict(n=2)): assert difference(run(model, (x,), kw), run(new, (x,), kw)).relative < 1e-12


def test_layers_that_stand_in_several_places_of_a_parent_that_cannot_be_followed():
    c, b = conv(), bn()
    for forward in (lambda m, x, **kw: m.named[kw.get('way', 'both')](x), lambda m, x, **kw: m.both(x) if kw.get('way', 'both') == 'both' else m.one(x)):
        model = net(forward, named=nn.ModuleDict(dict(both=nn.Sequential(c, b), one=nn.Sequential(c))), both=nn.Sequential(c, b), one=nn.Sequential(c))
        new = BN_Folder().fold(model, x)
        for kw in ({}, dict(way='one')): assert difference(run(model, (x,), kw), run(new, (x,), kw)).relative < 1e-12


numbers_given = dict(
    pad=(lambda m, x, mode='reflect', **kw: m.one(F.pad(m.bn(x), (1, 1, 1, 1), mode=mode)), dict(mode='constant')), narrow=(lambda m, x, at=0, **kw: m.bn(m.wide(x).narrow(1, at, 4)), dict(at=4)),
    part=(lambda m, x, at=0, **kw: m.bn(m.wide(x)[:, at:at+4]), dict(at=4)), order=(lambda m, x, order=(0, 1, 3, 2), **kw: m.one(m.bn(x[..., :4, :4]).permute(order)), dict(order=(0, 2, 1, 3))),
    dropout=(lambda m, x, on=False, **kw: m.bn(F.dropout(m.conv(x), 1., training=on)), dict(on=True)), chunk=(lambda m, x, at=0, **kw: m.bn(m.wide(x).chunk(2, 1)[at]), dict(at=1)),
    select=(lambda m, x, at=0, **kw: m.bn(m.wide(x).view(2, 2, 4, 8, 8).select(1, at)), dict(at=1)), pool=(lambda m, x, counts=False, **kw: m.one(F.avg_pool2d(m.bn(x), 3, 1, 1, count_include_pad=counts)), dict(counts=True)),
    roll=(lambda m, x, by=0, **kw: m.bn(m.conv(x).roll(by, 1)), dict(by=1)), flip=(lambda m, x, along=2, **kw: m.bn(m.conv(x).flip(along)), dict(along=1)), power=(lambda m, x, n=1, **kw: m.bn(m.conv(x)**n), dict(n=2)),
    scale=(lambda m, x, n=1, **kw: m.bn(m.conv(x)*n), dict(n=2)), add=(lambda m, x, n=0, **kw: m.bn(m.conv(x) + n), dict(n=2)), dim=(lambda m, x, dim=2, **kw: m.one(torch.cat([m.bn(x), m.bn(x)], dim)[:, :4]), dict(dim=1)),
    clamp=(lambda m, x, low=-1e9, **kw: m.bn(m.conv(x).clamp(low)), dict(low=0)), stride=(lambda m, x, by=1, **kw: m.bn(F.conv2d(x, m.conv.weight, m.conv.bias, by)), dict(by=2)),
    padding=(lambda m, x, by=0, **kw: F.conv2d(m.bn(x), m.conv.weight, m.conv.bias, 1, by), dict(by=1)), memory=(lambda m, x, how=torch.contiguous_format, **kw: m.bn(m.conv(x).contiguous(memory_format=how)), dict(how=torch.channels_last)),
    upsample=(lambda m, x, by=2, mode='nearest', **kw: m.one(F.interpolate(m.bn(x), scale_factor=by, mode=mode)), dict(by=3, mode='bilinear')), mean=(lambda m, x, over=(2, 3), **kw: m.bn(m.conv(x).mean(over, keepdim=True).expand(2, 4, 8, 8)), dict(over=(1, 2))),
    shuffle=(lambda m, x, groups=1, **kw: m.bn(F.channel_shuffle(m.conv(x), groups)), dict(groups=2)), pixels=(lambda m, x, by=1, **kw: m.bn(F.pixel_unshuffle(m.few(x), by)[:, :4].expand(2, 4, 8//by, 8//by)), dict(by=2)),
    split=(lambda m, x, size=4, **kw: m.bn(torch.cat(m.wide(x).split(size, 1)[::-1], 1)[:, :4]), dict(size=2)), groups=(lambda m, x, groups=1, **kw: m.bn(F.conv2d(x, m.conv.weight[:, :4//groups], None, 1, 1, 1, groups)), dict(groups=2)),
    stack=(lambda m, x, at=2, **kw: m.bn(torch.stack([m.conv(x), m.conv(x)], at).flatten(1, 2)[:, :4].view(2, 4, 8, -1)), dict(at=1)), moved=(lambda m, x, at=1, **kw: m.bn(m.conv(x[..., :4, :4]).movedim(1, at)), dict(at=2)),
    unbound=(lambda m, x, at=0, **kw: m.bn(m.wide(x).unflatten(1, (2, 4)).unbind(1)[at]), dict(at=1)), repeated=(lambda m, x, n=1, **kw: m.bn(m.conv(x).repeat(1, n, 1, 1)[:, ::n]), dict(n=2)))


@pytest.mark.parametrize('way', numbers_given)
@pytest.mark.parametrize('followed', [True, False])
def test_a_caller_gives_numbers_to_operations(way, followed):
    forward, kw = numbers_given[way]
    model = net(forward, conv=conv(), bn=bn(), wide=conv(8), few=conv(1), one=nn.Conv2d(4, 4, 1))
    if not followed: model.counts = iter(())
    for given, other in (({}, kw), (kw, {})):
        new = BN_Folder().fold(model, x, **given)
        for more in (given, other):
            torch.manual_seed(0)
            want = run(model, (x,), more)
            torch.manual_seed(0)
            assert difference(want, run(new, (x,), more)).relative < 1e-12


def looks_up(m, x): return sys.modules[m.library].relu(m.bn(m.conv(x)))
def test_code_that_looks_up_a_python_module():
    "keeps what it reads, and does not lead to all that was ever imported"
    model = pair(looks_up)
    model.library = 'torch'
    found = [*reached(type(model))]
    assert any(o is sys.modules for o,_ in found) and len(found) < 100
    folded(model, (x,), [(x,), (odd,)])
