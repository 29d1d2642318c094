"Code and state that no name in a `forward` leads to at once: each was once folded, wrongly."
import enum, functools, operator

import pytest, torch
from torch import Tensor, nn

import elsewhere
from fasterai.misc.bn_folding import BN_Folder
from helpers import net, randomise
from test_pretended import Hidden
from test_unfollowed import Net, Root, same_for_all
from test_ways import bn, conv, folded, odd, pair, x

examples = pytest.mark.parametrize('example', [False, True], ids=['symbolic', 'example'])


class Helper:
    def told(self, bn, y, x): return bn(y) if type(x) is not Tensor else y
class State:
    n = 0
    @classmethod
    def step(cls):
        cls.n += 1
        return cls.n
class Asking(type):
    n = 0
    def __call__(cls, x): return type(x) is not Tensor
    def __getitem__(cls, x): return type(x) is not Tensor
class Asks(metaclass=Asking): pass
class Kind:
    def __class_getitem__(cls, x): return type(x) is not Tensor
class Single(type):
    def __instancecheck__(cls, o): return o.shape[0] == 1
class One(metaclass=Single): pass
class Evenly(type):
    def __instancecheck__(cls, o): return o % 2 == 0
class Even(int, metaclass=Evenly): pass

def by_a_computed_name(m, x): return getattr(m, f'way_{m.mode}')(x)
def by_a_format(m, x): return getattr(m, 'way_{}'.format(m.mode))(x)
def by_a_percent(m, x): return getattr(m, 'way_%s' % m.mode)(x)
def by_two_names(m, x): return getattr(m, f'{m.start}_{m.mode}')(x)
def by_a_choice(m, x): return getattr(m, 'forward_x' if m.mode == 'x' else m.names[0])(x)
def by_a_default(m, x): return getattr(m, m.names[0], 'xx')(x)
def by_a_call(m, x): return getattr(m, min('zz', 'way_') + m.mode)(x)
def by_getattribute(m, x): return m.__getattribute__('way_' + m.mode)(x)
def by_attrgetter(m, x): return operator.attrgetter('way_' + m.mode)(m)(x)
asks_way, alias = operator.attrgetter('way_' + 'pre'), getattr
def by_a_getter(m, x): return asks_way(m)(x)
def by_an_alias(m, x): return alias(m, 'way_' + m.mode)(x)
def by_a_partial(m, x): return m.get()(x)
def by_a_partialmethod(m, x): return m.runs_way(x)
def by_an_enum(m, x): return Ways[m.mode](m, x)
def by_dispatch(m, x): return m.run('a', x)
def by_the_type_of_a_device(m, x): return m.conv(x) if x.device.type in {'cpu', 'cuda'} else m.bn(m.conv(x))
def by_the_text_of_it(m, x): return m.conv(x) if f'{x.device.type}' == 'cpu' else m.bn(m.conv(x))
def by_an_item_size(m, x): return m.conv(x) if {8: 1}.get(x.dtype.itemsize) else m.bn(m.conv(x))
def by_bits(m, x): return m.conv(x) if torch.finfo(x.dtype).bits in {64} else m.bn(m.conv(x))
def by_a_helper(m, x): return getattr(m.helper, m.how)(m.bn, m.conv(x), x)
def by_an_import(m, x):
    import elsewhere
    return elsewhere.norm(m.bn, m.conv(x), x)
def by_a_name_imported(m, x):
    from elsewhere import norm
    return norm(m.bn, m.conv(x), x)
def by_the_name_of_a_module(m, x): return getattr(elsewhere, m.op)(m.bn, m.conv(x), x)
def by_a_constant_name(m, x): return getattr(elsewhere, 'norm')(m.bn, m.conv(x), x)
def by_a_module_it_holds(m, x): return m.ops.norm(m.bn, m.conv(x), x)
def by_a_metaclass(m, x): return m.bn(m.conv(x)) if Asks(x) else m.conv(x)
def by_its_brackets(m, x): return m.bn(m.conv(x)) if Asks[x] else m.conv(x)
def by_a_kind(m, x): return m.bn(m.conv(x)) if Kind[x] else m.conv(x)
def by_a_class_body(m, x):
    class Body: y = elsewhere.norm(m.bn, m.conv(x), x)
    return Body.y
def by_dir(m, x): return m.bn(m.conv(x)) if 'tracer' in dir(m.conv(x)) else m.conv(x)
def of_a_double(m, x): return m.conv(x) if isinstance(m.conv(x), torch.DoubleTensor) else m.bn(m.conv(x))
def of_one(m, x): return m.conv(x) if isinstance(m.conv(x), One) else m.bn(m.conv(x))
def of_an_even_size(m, x): return m.conv(x) if isinstance(x.shape[-1], Even) else m.bn(m.conv(x))
def by_finally(m, x):
    y, fits = m.conv(x), False
    try:
        x + torch.ones(8)
        fits = True
    finally: return m.bn(y) if fits else y
def way_pre(m, x):
    y = m.conv(x)
    try: x + torch.ones(8)
    except RuntimeError: return y
    return m.bn(y)

class Ways(enum.Enum):
    pre = functools.partial(way_pre)
    def __call__(self, *args): return self.value(*args)
def runs(m, how, x): return how(m, x)
class Dispatches(nn.Module):
    @functools.singledispatchmethod
    def run(self, kind, x): return self.bn(self.conv(x))
    @run.register
    def _(self, kind: str, x): return way_pre(self, x)

class Made:
    k = 1
    def __init__(self, m, x): self.y = way_pre(m, x)
def makes(m, x): return Made(m, x).y
def by_what_is_made(m, x): return makes(m, x)*Made.k
def by_what_is_only_asked(m, x): return x if isinstance(x, Made) else makes(m, x)

out_of_sight = {n: f for n,f in dict(globals()).items() if n.startswith(('by_', 'of_'))}

@examples
@pytest.mark.parametrize('name', out_of_sight)
def test_code_that_no_name_leads_to(name, example):
    model = pair(out_of_sight[name])
    type(model).way_pre, type(model).ops, type(model).runs_way, type(model).run = way_pre, elsewhere, functools.partialmethod(runs, way_pre), vars(Dispatches)['run']
    model.mode, model.helper, model.how, model.op, model.start, model.names = 'pre', Helper(), 'told', 'norm', 'way', ['way_pre']
    if out_of_sight[name] is by_a_partial: model.get = functools.partial(getattr, model, 'way_pre')
    folded(model, (x,) if example else (), [(x,), (odd,), (x[:1],)])

def test_a_layer_by_its_number():
    "is looked up among few names: what else a class does is not read for it"
    class Layers(nn.Module):
        def __init__(self): super().__init__(); self.layer1, self.layer2 = nn.Sequential(conv(), bn()), nn.Sequential(conv(), bn())
        def tries(self):
            try: return 1
            except ValueError: return 2
        def forward(self, x):
            for i in (1, 2): x = getattr(self, f'layer{i}')(x)
            return x
    for example in ((), (x,)): assert folded(randomise(Layers()), example, [(x,), (odd,)]).folded == 2


def in_an_imported_module(m):
    import elsewhere
    elsewhere.n += 1
    return elsewhere.n
def by_setattr(m):
    setattr(elsewhere, 'n', elsewhere.n + 1)
    return elsewhere.n
def of_a_module_it_holds(m): return m.ops.step()
def of_a_class(m): return State.step()
def of_a_metaclass(m):
    type(Asks).n += 1
    return Asking.n
def forget(): elsewhere.n = State.n = Asking.n = 0

@examples
@pytest.mark.parametrize('count', [in_an_imported_module, by_setattr, of_a_module_it_holds, of_a_class, of_a_metaclass])
def test_counts_out_of_sight(count, example):
    def again():
        forget()
        torch.manual_seed(0)
        model = pair(lambda m, x: m.bn(m.conv(x)) if count(m) <= 4 else m.conv(x))
        type(model).ops = elsewhere
        return model
    new = BN_Folder().fold(again(), *([x] if example else []))
    forget()
    got = [new(x) for _ in range(7)]
    model = again()
    for y in got: torch.testing.assert_close(y, model(x), rtol=1e-9, atol=1e-9)

def test_left_for_a_child_in_a_class():
    class Context:
        y = None
        @classmethod
        def put(cls, y): cls.y = y
    def leaves(m, x):
        y = m.conv(x)
        Context.put(y)
        y = m.child(m.bn(y))
        Context.put(None)
        return y
    torch.manual_seed(0)
    folded(pair(leaves, child=Hidden(lambda c: Context.y)), (), [(x,)])


def whole(net, x): return net(x)
def apart(net, x): return net.conv(x)
def given(net, x, how=whole): return how(net, x)
def both(a, b, x): return a(x) + b.conv(x)
def act(net, x): return net(x)
def goes(net, xs, act): return sum(act(net, x) for x in xs)
class Runs:
    def __new__(cls, net, x):
        o = object.__new__(cls)
        o.y = net.conv(x)
        return o
    def __init__(self, net, x): pass
class Parent(Root):
    def run(self, net, x): return net.conv(x)
class BySuper(Parent):
    def run(self, net, x): return super().run(net, x)
    def other(self, x): return self.run(self.net, x)
class ByInstance(Root):
    def __init__(self): super().__init__(); self.run = self.pre
    def run(self, net, x): return net(x)
    def pre(self, net, x): return net.conv(x)
    def other(self, x): return self.run(self.net, x)
class ByProperty(Root):
    def __init__(self): super().__init__(); self._modules['stem'] = nn.Identity()
    @property
    def stem(self): return self.net.conv
    def other(self, x): return self.stem(x)
class ByBound(Root):
    def __init__(self): super().__init__(); self.pick = {'stem': self.net.conv}.get
    def other(self, x): return self.pick('stem')(x)
class ByKeyword(Root):
    def other(self, x): return given(self.net, x, how=apart)
class ByStar(Root):
    def __init__(self): super().__init__(); self.more = nn.ModuleList([Net(), Net()])
    def other(self, x): return both(*self.more, x)
class ByStarredList(Root):
    def other(self, x): return both(*[self.net, self.nets[1]], x)
class ByKeys(Root):
    def other(self, x): return [net.conv(x) for net in {self.net: 1}.keys()][0]
class ByItems(Root):
    def other(self, x): return [net.conv(x) for net,_ in {self.net: 1}.items()][0]
class ByCell(Root):
    def other(self, x): return goes(self.net, [x], apart)
class ByNew(Root):
    def other(self, x): return Runs(self.net, x).y

@pytest.mark.parametrize('make', [BySuper, ByInstance, ByProperty, ByBound, ByKeyword, ByStar, ByStarredList, ByKeys, ByItems, ByCell, ByNew])
def test_a_child_by_another_way(make): same_for_all(make)


def test_a_class_is_put_back():
    class Fast(nn.Module): pass
    def turns(m, x):
        y = m.bn(m.conv(x))
        m.__class__ = Fast
        return y
    for example in ((), (x,)):
        model = pair(turns)
        kind = type(model)
        try: BN_Folder().plan(model, *example)
        finally: assert type(model) is kind

class Rows:
    def __init__(self, x): self.x = x
    def __getitem__(self, i): return self.x[i]

def test_an_old_iterator_comes_to_an_end():
    report = BN_Folder().plan(pair(lambda m, x: m.bn(torch.stack([r for r in Rows(m.conv(x))]))))
    assert report['bn'].why.endswith('it loops over its input')

def test_a_mode_that_is_computed():
    def sets(m, x):
        m.bn.training = x.shape[0] > 1
        return m.bn(m.conv(x))
    assert 'it changes the settings of `bn`' in BN_Folder().plan(pair(sets))['bn'].why
