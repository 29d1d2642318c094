"What a model keeps between two calls, in whatever it is held, decides the next one; and is as it was after a fold. Each was once folded, wrongly, or changed."
import collections, contextvars, enum, heapq, io, itertools, math, random, threading, types

import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from fasterai.misc.bn_folding import BN_Folder, FoldError
from helpers import net, randomise
from test_ways import bn, conv

small, large = (torch.randn(2, 4, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (5, 12))
examples = pytest.mark.parametrize('example', [(), (small,)], ids=['symbolic', 'example'])

Phase, Pair = enum.Enum('Phase', 'A B C D E'), collections.namedtuple('Pair', 'n')
class History(list): pass
class Options(dict): pass
class Config: step = 0
class Counted(nn.Module):
    "Its `start` is a state, to which `step` is done in each call, until it is `late`"
    calls = 0
    def __init__(self, start, step, late): super().__init__(); self.conv, self.bn, self.n, self.step, self.late = conv(), bn(), start(), step, late
    @classmethod
    def tick(cls): cls.calls += 1
    def forward(self, x):
        self.step(self)
        y = self.conv(x)
        return y if self.late(self) else self.bn(y)
def put(m, n): m.n = n
def ticked(): ticked.calls += 1
ticked.calls = 0
def of_class(m): Config.step += 1
def of_alias(m):
    config = Config
    config.step += 1
def closed():
    n = [0]
    def step(m): n[0] += 1
    return step, lambda m: n[0] > 3
state = types.ModuleType('state')
state.step = 0
def of_module(m): state.step += 1

states = dict(
    element=(lambda: [0], lambda m: m.n.__setitem__(0, m.n[0]+1), lambda m: m.n[0] > 3),
    tensor=(lambda: torch.zeros(()), lambda m: m.n.add_(1), lambda m: m.n > 3),
    new_tensor=(lambda: torch.zeros(1), lambda m: put(m, torch.cat([m.n, m.n[:1]])), lambda m: len(m.n) > 3),
    array=(lambda: np.zeros(1), lambda m: m.n.__setitem__(0, m.n[0]+1), lambda m: m.n[0] > 3),
    numpy_number=(lambda: np.int64(0), lambda m: put(m, m.n+1), lambda m: m.n > 3),
    complex_number=(lambda: 0j, lambda m: put(m, m.n+1), lambda m: m.n.real > 3),
    tuple=(lambda: (0,), lambda m: put(m, (m.n[0]+1,)), lambda m: m.n[0] > 3),
    namedtuple=(lambda: Pair(0), lambda m: put(m, Pair(m.n.n+1)), lambda m: m.n.n > 3),
    enum=(lambda: Phase.A, lambda m: put(m, Phase(min(m.n.value+1, 5))), lambda m: m.n == Phase.E),
    new_list=(lambda: [], lambda m: put(m, m.n + [0]), lambda m: len(m.n) > 3),
    new_dict=(lambda: dict(c=0), lambda m: put(m, dict(c=m.n['c']+1)), lambda m: m.n['c'] > 3),
    deque=(lambda: collections.deque([0]*4, maxlen=4), lambda m: m.n.append(1), lambda m: m.n[0] == 1),
    namespace=(lambda: types.SimpleNamespace(c=0), lambda m: put(m, types.SimpleNamespace(c=m.n.c+1)), lambda m: m.n.c > 3),
    frozenset=(lambda: frozenset(), lambda m: put(m, m.n | {len(m.n)}), lambda m: len(m.n) > 3),
    user_dict=(lambda: collections.UserDict(n=0), lambda m: m.n.update(n=m.n['n']+1), lambda m: m.n['n'] > 3),
    chain_map=(lambda: collections.ChainMap(dict(n=0)), lambda m: m.n.update(n=m.n['n']+1), lambda m: m.n['n'] > 3),
    list_subclass=(History, lambda m: m.n.append(0), lambda m: len(m.n) > 3),
    dict_subclass=(lambda: Options(n=0), lambda m: m.n.update(n=m.n['n']+1), lambda m: m.n['n'] > 3),
    bytearray=(lambda: bytearray(1), lambda m: m.n.append(0), lambda m: len(m.n) > 3),
    class_attribute=(int, lambda m: m.tick(), lambda m: m.calls > 3),
    of_class=(int, of_class, lambda m: Config.step > 3),
    of_alias=(int, of_alias, lambda m: Config.step > 3),
    of_function=(int, lambda m: ticked(), lambda m: ticked.calls > 3),
    of_module=(int, of_module, lambda m: state.step > 3),
    closure=(int, *closed()),
    iterator=(itertools.count, lambda m: None, lambda m: next(m.n) > 3),
    event=(lambda: [threading.Event(), threading.Event()], lambda m: m.n[m.n[0].is_set()].set(), lambda m: m.n[1].is_set()))
lasting = {'iterator': 'nothing can put it back', 'event': 'nothing can put it back'}

def reset():
    Config.step = Counted.calls = ticked.calls = state.step = 0
    states['closure'] = int, *closed()

def calls(model, n=6): return [model(small) for _ in range(n)]

@examples
@pytest.mark.parametrize('name', states)
def test_a_counter_is_never_overlooked(name, example):
    def build():
        reset()
        torch.manual_seed(0)
        return randomise(Counted(*states[name]))
    with torch.no_grad():
        want = calls(build())
        model = build()
        BN_Folder().plan(model, *example)
        if not (example and name in lasting): assert all(map(torch.equal, want, calls(model)))
        try: new = BN_Folder().fold(build(), *example)
        except TypeError: return # the state can't be copied
        reset()
        if not (example and name in lasting): assert all(map(torch.allclose, want, calls(new)))

class Gate(nn.Module):
    def __init__(self, values, where): super().__init__(); self.values, self.where = values, where
    def forward(self, x): setattr(self if self.where is None else self.where, 'mode', self.values[1] if x.shape[2] > 10 else self.values[0])
class Gated(nn.Module):
    def __init__(self, values, late, own): super().__init__(); self.conv, self.bn, self.late, self.where = conv(), bn(), late, None if own else types.SimpleNamespace(mode=values[0]); self.gate = Gate(values, self.where)
    def forward(self, x):
        self.gate(x)
        y = self.conv(x)
        return y if self.late((self.where or self.gate).mode) else self.bn(y)
def no(): return False
def yes(): return True

@examples
@pytest.mark.parametrize('own', [True, False])
@pytest.mark.parametrize('values,late', [((np.int64(0), np.int64(1)), bool), ((torch.zeros(()), torch.ones(())), bool), ((no, yes), lambda f: f()),
                                         ((frozenset(), frozenset({1})), bool), ((0j, 1j), bool), ((np.zeros(1), np.ones(1)), lambda a: a[0] > 0)])
def test_what_a_child_leaves_is_compared(values, late, own, example):
    model = randomise(Gated(values, late, own))
    new = BN_Folder().fold(model, *example)
    with torch.no_grad():
        for x in (small, large, small): assert torch.allclose(model(x), new(x))


class Late(nn.Module):
    "Keeps its BatchNorm out of the way when it is `late`, with a `child` to ask"
    def __init__(self, child, late): super().__init__(); self.conv, self.bn, self.after, self.child, self.late = conv(), bn(), conv(), child, late
    def forward(self, x):
        y = self.conv(x)
        return y if self.late(self, x) else self.bn(y)
class Child(nn.Module):
    mode = 'small'
    def __init__(self, write, **held): super().__init__(); self.write = write; vars(self).update(held)
    def forward(self, x): return self.write(self, x)
    def is_large(self): return self.mode == 'large'
class Same(Child): pass
class Opaquely(Child):
    def forward(self, x): int(x.amax()); return self.write(self, x)
def after(ask): return lambda m, x: (m.child(x), ask(m.child))[1]
def large_in(ask): return lambda m, x: ask(m.child(x))
def moded(c, x): c.mode = 'large' if x.shape[2] > 10 else 'small'
def sliced(c, x):
    if x.shape[2] > 10: c.kept[:] = [1]
    else: c.kept[:] = [0]
def heaped(c, x):
    if x.shape[2] > 10: heapq.heapreplace(c.kept, 1)
    else: heapq.heapreplace(c.kept, 0)
def reordered(c, x):
    if x.shape[2] > 10: c.kept['a'] = c.kept.pop('a')
    else: c.kept['b'] = c.kept.pop('b')
def filled(c, x): c.kept.fill_(1 if x.shape[2] > 10 else 0)
def copied_to(c, x): np.copyto(c.kept, 1 if x.shape[2] > 10 else 0)
class Wholes(int): pass
def of_kind(c, x): c.kept = Wholes(x.shape[2] > 10) if x.shape[2] > 10 else Wholes(0)
def below(c, x):
    if x.shape[2] > 10: c.inner.kept.insert(0, 1)
    else: c.inner.kept.insert(0, 0)
def holding(kept):
    inner = nn.Module()
    inner.kept = kept
    return inner
def several(a, b): return lambda c, x: a if x.shape[2] > 10 else b
class Equal:
    def __init__(self, mode): self.mode = mode
    def __eq__(self, other): return True

NAMES = ('mode',)
asked = dict(
    slice=(lambda: Child(sliced, kept=[0]), after(lambda c: c.kept[0])), heap=(lambda: Child(heaped, kept=[0]), after(lambda c: c.kept[0])),
    order=(lambda: Child(reordered, kept=dict(a=0, b=1)), after(lambda c: [*c.kept][0] == 'b')), opaque_slice=(lambda: Opaquely(sliced, kept=[0]), after(lambda c: c.kept[0])),
    opaque_fill=(lambda: Opaquely(filled, kept=torch.zeros(1)), after(lambda c: c.kept[0] > 0)), opaque_copy=(lambda: Opaquely(copied_to, kept=np.zeros(1)), after(lambda c: c.kept[0] > 0)),
    inside=(lambda: Child(below, _modules=dict(inner=holding([0]))), after(lambda c: c.inner.kept[0])),
    own_method=(lambda: Same(moded), after(lambda c: c.is_large())), global_names=(lambda: Child(moded), after(lambda c: any(getattr(c, n) == 'large' for n in NAMES))),
    int_subclass=(lambda: Child(of_kind, kept=Wholes(0)), after(lambda c: c.kept)),
    equal=(lambda: Child(several(Equal('large'), Equal('small'))), large_in(lambda o: o.mode == 'large')), order_of_keys=(lambda: Child(several(dict(a=0, b=1), dict(b=1, a=0))), large_in(lambda o: [*o][0] == 'a')),
    zeros=(lambda: Child(several(-0., 0.)), large_in(lambda o: math.copysign(1, o) < 0)), maxlen=(lambda: Child(several(collections.deque([0], maxlen=5), collections.deque([0], maxlen=6))), large_in(lambda o: o.maxlen == 5)))

@examples
@pytest.mark.parametrize('name', asked)
def test_what_ways_leave_is_told_apart(name, example):
    child, late = asked[name]
    model = randomise(Late(child(), late))
    new = BN_Folder().fold(model, *example)
    with torch.no_grad():
        for x in (small, large, small): assert torch.allclose(model(x), new(x))

class Keeps(nn.Module):
    def forward(self, x, a, b, out):
        if x.shape[2] > 10: out.append(a)
        else: out.append(b)

@examples
def test_tensors_that_two_ways_leave(example):
    def forward(m, x):
        y, out = m.conv(x), []
        z = m.bn(y)
        m.keep(x, y, z, out)
        return m.after(out[0])
    model = randomise(net(forward, conv=conv(), bn=bn(), after=conv(), keep=Keeps()))
    new = BN_Folder().fold(model, *example)
    with torch.no_grad():
        for x in (small, large): assert torch.allclose(model(x), new(x))

class Slotted:
    __slots__ = '__n', 'm'
    def __init__(self): self.__n = 0
    def tick(self): self.__n += 1; return self.__n
class Slot:
    __slots__ = 'count'
    def __init__(self): self.count = 0
    def tick(self): self.count += 1; return self.count

def hits(t): t.hits = getattr(t, 'hits', 0) + 1; return t.hits
def added(t): t.data.add_(1); return t.real.sum()

@examples
@pytest.mark.parametrize('start,tick', [(Slotted, lambda o: o.tick()), (Slot, lambda o: o.tick()), (lambda: torch.zeros(1), hits), (lambda: torch.zeros(1, dtype=torch.complex64), added),
                                        (lambda: [nn.Parameter(torch.zeros(1))], lambda ps: added(ps[0])), (lambda: torch.tensor([0., math.nan]), lambda t: added(t[:1]))])
def test_counters_in_odd_places(start, tick, example):
    def forward(m, x):
        n, y = tick(m.n), m.conv(x)
        return y if n > 3 else m.bn(y)
    def build():
        torch.manual_seed(0)
        return randomise(net(forward, conv=conv(), bn=bn(), n=start()))
    with torch.no_grad():
        want, model = calls(build()), build()
        BN_Folder().plan(model, *example)
        assert all(map(torch.equal, want, calls(model)))
        assert all(map(torch.allclose, want, calls(BN_Folder().fold(build(), *example))))

def printed(m, x):
    out = io.StringIO()
    print(f'{x.shape[2]}', file=out)
    return m.conv(x) if '12' in out.getvalue() else m.bn(m.conv(x))
def printed_plainly(m, x):
    out = io.StringIO()
    print(x.shape[2], file=out)
    return m.conv(x) if '12' in out.getvalue() else m.bn(m.conv(x))
def registered(m, x):
    box = nn.Module()
    nn.Module.register_buffer(box, f'b{x.shape[2]}', None)
    return m.conv(x) if hasattr(box, 'b12') else m.bn(m.conv(x))
def either(m, x):
    tags = []
    (print if m.bn.training else tags.append)(f'{x.shape[2]}')
    return m.conv(x) if '12' in tags else m.bn(m.conv(x))

@examples
@pytest.mark.parametrize('forward', [printed, printed_plainly, registered, either])
def test_text_that_goes_somewhere(forward, example):
    model = randomise(net(forward, conv=conv(), bn=bn()))
    with torch.no_grad():
        for _ in range(9): model(small) # Python's own code is another once it is warm
        new = BN_Folder().fold(model, *example)
        for x in (small, large): assert torch.allclose(model(x), new(x))

@examples
def test_a_graph_in_a_model(example):
    graph = torch.fx.symbolic_trace(nn.Sequential(conv(), bn(), nn.ReLU()))
    model = randomise(nn.Sequential(graph, net(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=bn())))
    folder = BN_Folder()
    new = folder.fold(model, *example)
    assert folder.report.folded == 2
    with torch.no_grad(): assert torch.allclose(model(large), new(large))


class Picks(nn.Module):
    def __init__(self): super().__init__(); self.conv, self.bn, self.which = conv(), bn(), 'small'
    def pick(self, key): self.which = {'12': 'large'}.get(key, 'small')
    def forward(self, x):
        self.pick(f'{x.shape[2]}')
        y = self.conv(x)
        return self.bn(y) if self.which == 'small' else y
def of_tags(m, x):
    tags = []
    tags.append(f'{x.shape[2]}x{x.shape[3]}')
    return m.conv(x) if '12x12' in tags else m.bn(m.conv(x))
def of_types(m, x):
    tags = []
    tags.append(str(x.dtype))
    return m.conv(x) if 'torch.float64' in tags else m.bn(m.conv(x))
def of_index(m, x): return m.conv(x) if x.device.index is None else m.bn(m.conv(x))
def of_grad(m, x): return m.conv(x) if x.grad is None else m.bn(m.conv(x))
def of_base(m, x): return m.conv(x) if x._base is None else m.bn(m.conv(x))
def of_a_missing_grad(m, x):
    try: x.grad.abs()
    except AttributeError: return m.conv(x)
    return m.bn(m.conv(x))
def of_a_symbol(m, x): return m.bn(m.conv(x)) if hasattr(x.shape[2], 'node') else m.conv(x)
def of_a_shape(m, x): return m.bn(m.conv(x)) if hasattr(x.shape, 'rows') or hasattr(x.dtype, 'rows') else m.conv(x)

@examples
@pytest.mark.parametrize('forward', [None, of_tags, of_types, of_index, of_grad, of_base, of_a_missing_grad, of_a_symbol, of_a_shape])
def test_what_a_value_is_asked(forward, example):
    model = randomise(Picks() if forward is None else net(forward, conv=conv(), bn=bn()))
    new = BN_Folder().fold(model, *example)
    with torch.no_grad():
        for x in (small, large): assert torch.allclose(model(x), new(x))

def test_a_message_may_say_what_there_is():
    def forward(m, x):
        torch._assert(x.dim() == 4, f'four axes, not {x.dim()}')
        if x.shape[1] != 4: raise ValueError(f'four channels, not {x.shape[1]}')
        return m.bn(m.conv(x))
    assert BN_Folder().plan(randomise(net(forward, conv=conv(), bn=bn()))).folded == 1


def capped(m, x):
    m.act.max_val = m.cap
    return m.after(m.act(m.bn(m.conv(x).relu())))
def plain(m, x): return m.after(m.act(m.bn(m.conv(x).relu())))

@examples
@pytest.mark.parametrize('forward,act', [(capped, nn.Hardtanh(-1, 1)), (plain, nn.ReLU6())])
def test_the_bounds_are_those_of_the_call(forward, act, example):
    act.max_val = .5
    model = randomise(net(forward, conv=conv(), bn=bn(), act=act, after=conv(padding=0), cap=.25))
    folder = BN_Folder(through_relu=True)
    new = folder.fold(model, *example)
    assert folder.report.folded == (forward is plain)
    with torch.no_grad(): assert torch.allclose(model(small), new(small))


def asks(m, x): return m.bn(m.conv(x))*(2 if parametrize.is_parametrized(m.conv) else 1)
def asks_when_large(m, x): return m.bn(m.conv(x))*(2 if x.shape[2] > 10 and parametrize.is_parametrized(m.conv) else 1)
def reads_when_large(m, x):
    y = m.bn(m.conv(x))
    return y + m.conv.parametrizations.weight.original0.norm() if x.shape[2] > 10 else y

@examples
@pytest.mark.parametrize('forward', [asks, asks_when_large, reads_when_large])
def test_who_asks_how_a_weight_is_computed(forward, example):
    model = randomise(net(forward, conv=parametrizations.weight_norm(conv()), bn=bn()))
    with torch.no_grad(): want = model(large)
    with pytest.raises(FoldError, match='gone once its weights are plain.*without `bake`'): BN_Folder(bake=True).fold(model, *example)
    with torch.no_grad(): assert torch.equal(model(large), want)


current, local = contextvars.ContextVar('current'), threading.local()
class Held(nn.Module):
    "Another way to the first layer of `block` than by its name"
    def __init__(self, keep, other): super().__init__(); self.block, self.other = nn.Sequential(conv(), bn()), other; keep(self)
    def forward(self, x): return self.block(x) + self.other(self)(x)
ways_in = dict(
    iterator=(lambda m: setattr(m, 'order', itertools.cycle([m.block[0]])), lambda m: next(m.order)),
    context=(current.set, lambda m: current.get().block[0]),
    thread=(lambda m: setattr(local, 'net', m), lambda m: local.net.block[0]))

@pytest.mark.parametrize('name', ways_in)
def test_holders_that_nobody_sees_into(name):
    model = randomise(Held(*ways_in[name]))
    with torch.no_grad(): want = model(small)
    BN_Folder().fold(model, inplace=True)
    with torch.no_grad(): assert torch.allclose(model(small), want)


def test_what_someone_put_in_the_place_of_pytorchs(monkeypatch):
    model = randomise(net(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=bn()))
    def standardised(self, x, weight, bias, plain=nn.Conv2d._conv_forward): return plain(self, x, weight - weight.mean(), bias)
    def halved(*args, plain=F.batch_norm, **kw): return plain(*args, **kw)/2
    for space, name, f in ((nn.Conv2d, '_conv_forward', standardised), (F, 'batch_norm', halved)):
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(space, name, f)
            for example in ((), (small,)): assert torch.allclose(model(small), BN_Folder().fold(model, *example)(small))


STEP, STATS = 0, dict(n=0)
def of_global(m):
    global STEP
    STEP += 1
    return STEP
def of_stats(m): STATS['n'] += 1; return STATS['n']
def of_context(m): steps.set(steps.get() + 1); return steps.get()
def of_freezing(m):
    for p in m.conv.parameters(): p.requires_grad = False
    m.conv.zero_grad()
    return float(m.conv.weight.requires_grad)
steps = contextvars.ContextVar('steps')
steps.set(0)

def drawn(o):
    if isinstance(o, torch.Generator): return o.get_state().tolist()
    return o.getstate() if isinstance(o, random.Random) else o and repr(o.bit_generator.state)

@pytest.mark.parametrize('number,held', [(of_global, 0), (of_stats, 0), (of_context, 0), (of_freezing, 0), (lambda m: torch.rand(1, generator=m.held).item(), torch.Generator()),
                                         (lambda m: m.held.random(), random.Random(0)), (lambda m: m.held.random(), np.random.default_rng(0))])
def test_a_recorded_run_leaves_nothing(number, held):
    model = randomise(net(lambda m, x: m.bn(m.conv(x)) + number(m), conv=conv(), bn=bn(), held=held))
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    see = lambda: (STEP, STATS['n'], steps.get(), model.conv.weight.requires_grad, model.conv.weight.grad is not None, drawn(held))
    before = see()
    BN_Folder().plan(model, small)
    assert see() == before


class Shy(dict): __getattr__ = dict.__getitem__ # a name that is missing is a KeyError

@examples
def test_a_dict_that_answers_to_names(example):
    model = randomise(net(lambda m, x: m.bn(m.conv(x))*m.options.k, conv=conv(), bn=bn(), options=Shy(k=2)))
    with torch.no_grad(): want = model(small)
    with pytest.raises(TypeError, match='options.*KeyError.*inplace'): BN_Folder().fold(model, *example)
    folder = BN_Folder()
    folder.fold(model, *example, inplace=True)
    assert folder.report.folded == 1
    with torch.no_grad(): assert torch.allclose(model(small), want)

class Silent(list):
    def __iter__(self): raise RuntimeError('it is not to be looked through')

def nested(): return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])

@examples
@pytest.mark.parametrize('held', [Silent([1]), nested(), [nested()], torch.ones(2, 2).to_mkldnn()], ids=['no iterator', 'nested', 'nested in a list', 'mkldnn'])
def test_what_cant_be_looked_into(held, example):
    model = randomise(net(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=bn(), held=held))
    assert BN_Folder().plan(model, *example).folded == 1
    if not isinstance(held, Silent):
        with pytest.raises(TypeError, match='`held`.*inplace'): BN_Folder().fold(model, *example)
    folder = BN_Folder()
    folder.fold(model, *example, inplace=True)
    assert folder.report.folded == 1
