"What code that can't be followed may do besides calling its children: use what is inside of them, write what they ask for, take a Sequential apart."
import copy, functools, itertools, operator, os, types, weakref

import numpy as np, pytest, torch
import torch.nn.functional as F
from fastcore.foundation import L
from torch import nn

from fasterai.misc.bn_folding import BN_Folder
from helpers import net, randomise
from test_ways import bn, conv, folded, pair

small, large = (torch.randn(2, 4, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (5, 9))


class Net(nn.Module):
    on = True
    def __init__(self): super().__init__(); self.conv, self.bn = conv(), bn()
    def asks(self): return True
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if self.asks() else y
class Convolves(nn.Module):
    def __init__(self): super().__init__(); self.conv = conv()
    def forward(self, x): return self.conv(x)
class Normalises(nn.Module):
    def __init__(self): super().__init__(); self.bn = bn()
    def forward(self, x): return self.bn(x)
class Root(nn.Module):
    "Can't be followed, if it is not `followed`: it asks for a list. Its `other` way is that of a larger input"
    other,followed = lambda self, x: None, False
    def __init__(self):
        super().__init__()
        self.net, self.seq, self.apart, self.nets = Net(), nn.Sequential(conv(), bn()), nn.Sequential(Convolves(), Normalises()), nn.ModuleList([nn.Sequential(Convolves(), Normalises()), Net()])
    def usual(self, x): return self.nets[1](self.nets[0](self.apart(self.seq(self.net(x)))))
    def forward(self, x):
        if not self.followed and type(x) is list: x = x[0]
        return self.other(x) if x.shape[-1] > 6 else self.usual(x)
    def does2(self, x): return self.net.conv(x)


def same_for_all(make, *, folds=None):
    "Nothing changes at either size, folded with an example of either, or without one; a copy or in place"
    for example, followed in itertools.product([(), (small,), (large,)], [False, True]):
        model = randomise(make()).eval().double()
        model.followed = followed
        want = [model(x).clone() for x in (large, small)]
        folder = BN_Folder()
        new = folder.fold(copy.deepcopy(model), *example, inplace=True)
        for x, y in zip((large, small), want): torch.testing.assert_close(new(x), y, rtol=1e-9, atol=1e-9)
        if folds is not None and not (example or followed): assert folder.report.folded == folds


get_conv = operator.attrgetter('net.conv')
class Helper:
    def __init__(self, m): self.m = m
    def __call__(self, x): return self.m.net.conv(x)
def helps(m, x): return m.net.conv(x)
def takes(m, x):
    for l in m.apart: return l(x)
def first(l, x): return l[0](x)
def by_loop(m, x):
    for l in m.apart: return l(x)
def by_unpacking(m, x):
    a, *_ = m.seq
    return a(x)
def by_name(m, x): return m.alias(x)
def by_local(m, x):
    n = m
    return n.net.conv(x)
def by_match(m, x):
    k = [m]
    return k[0].net.conv(x)
def by_copy(m, x):
    n = copy.copy(m.net)
    n.bn = nn.Identity()
    return n(x)
def by_training(m, x):
    m.requires_grad_(False)
    return m.net(x) + sum(p.sum() for p in m.net.conv.parameters())
def by_two_loops(m, x):
    for l in m.nets:
        for k in l: return k(x)
def by_enumerate(m, x):
    for l in m.nets:
        for _, k in enumerate(l): return k(x)
def by_walrus(m, x): return (k := m.net) and k.conv(x)
def by_starred(m, x):
    a, *rest = [m.net, m.seq]
    return rest[0][0](x) + a(x)
def by_zip(m, x):
    for _, k in zip(range(1), m.seq): return k(x)
def by_dict_of_names(m, x):
    for _, k in m.seq.named_children(): return k(x)
def by_inner(m, x):
    def inner(k=m.net): return k.conv(x)
    return inner()
def by_closure(m, x):
    k = m.net
    def inner(): return k.conv(x)
    return inner()
def by_with(m, x):
    with Taken(m.net) as k: return k.conv(x)
def by_try(m, x):
    try: raise LookupError(m.net)
    except LookupError as e: return e.args[0].conv(x)
def by_deletion(m, x):
    kept, m.net.bn = m.net.bn, nn.Identity()
    y = m.net(x)
    m.net.bn = kept
    return y
def by_hook(m, x):
    seen = []
    h = m.net.conv.register_forward_hook(lambda k, args, out: seen.append(out))
    m.net(x)
    h.remove()
    return seen[0]
def by_apply(m, x):
    seen = []
    m.net.apply(lambda k: seen.append(k(x)) if isinstance(k, nn.Conv2d) else None)
    return seen[0]
def by_append(m, x):
    todo = []
    todo.append(m.net)
    return todo.pop().conv(x)
def by_growing(m, x):
    todo = [m.seq]
    todo += [m.net]
    return todo[-1].conv(x)
def by_yield(m, x): return next(gives(m)).conv(x)
def gives(m): yield m.net
def by_kw(m, x): return takes_kw(net=m.net, x=x)
def takes_kw(net, x): return net.conv(x)
def by_args(m, x): return takes_all(x, m.net)
def takes_all(x, *rest): return rest[0].conv(x)
def by_spread(m, x): return takes_kw(**dict(net=m.net, x=x))
def by_default(m, x, take=takes_kw): return take(m.net, x)
def by_recursion(m, x): return deep(3, m, x)
def deep(n, m, x): return deep(n-1, m, x) if n else m.net.conv(x)
class Taken:
    def __init__(self, k): self.k = k
    def __enter__(self): return self.k
    def __exit__(self, *_): pass

others = dict(walrus=by_walrus, starred=by_starred, zipped=by_zip, names=by_dict_of_names, inner=by_inner, closure=by_closure, with_=by_with, try_=by_try, deleted=by_deletion, mode=lambda m, x: m.net.train(False).conv(x),
              hook=by_hook, applied=by_apply, append=by_append, growing=by_growing, yields=by_yield, keyword=by_kw, args=by_args, spread=by_spread, default=by_default, recursion=by_recursion,
              getattr_=lambda m, x: getattr(m.net, 'conv')(x), computed=lambda m, x: getattr(getattr(m, 'ne' + 't'), 'conv')(x), dunder=lambda m, x: m.__getattr__('net').conv(x),
              children=lambda m, x: [*m.seq.children()][0](x), all_modules=lambda m, x: [k for k in m.net.modules() if isinstance(k, nn.Conv2d)][0](x), wrapped=lambda m, x: nn.Sequential(*m.seq[:1])(x),
              of_type=lambda m, x: Convolves.forward(m.net, x), functional_call=lambda m, x: torch.func.functional_call(m.net, {'bn.weight': m.net.bn.weight*2}, (x,)), state=lambda m, x: m.state_dict()['net.bn.weight'].sum() + x,
              named=lambda m, x: dict(m.net.named_parameters())['conv.weight'].sum() + x, vector=lambda m, x: nn.utils.parameters_to_vector(m.net.parameters()).sum() + x, deep_copied=lambda m, x: copy.deepcopy(m.seq)[0](x),
              methodcaller=lambda m, x: operator.methodcaller('does2', x)(m), partial=lambda m, x: functools.partial(takes_kw, m.net)(x), buffers=lambda m, x: sum(b.sum() for b in m.net.buffers()) + x,
              eps=lambda m, x: x*m.net.bn.running_var.mean(), called_by_name=lambda m, x: m.net.__getattr__('conv').__call__(x), stacked=lambda m, x: (lambda k: k.conv(x))(m.net), chosen=lambda m, x: (m.net if x.sum() < 9e9 else m.seq).conv(x),
              index=lambda m, x: m.seq[0](x), apart=lambda m, x: m.apart[0](x), slice=lambda m, x: m.seq[:1](x), loop=by_loop, unpacking=by_unpacking, getter=lambda m, x: get_conv(m)(x),
              attrgetter=lambda m, x: operator.attrgetter('net.conv')(m)(x), eval=lambda m, x: eval('m.net.conv(x)'), helper=lambda m, x: Helper(m)(x), function=helps, takes=takes,
              first=lambda m, x: first(m.nets[0], x), two_loops=by_two_loops, enumerated=by_enumerate, local=by_local, in_a_list=by_match, copied=by_copy, weights=by_training,
              parameter=lambda m, x: F.conv2d(x, m.nets[1].get_parameter('conv.weight'), padding=1), functional=lambda m, x: F.conv2d(x, m.net.conv.weight, padding=1),
              inherited=lambda m, x: m.does2(x), reduced=lambda m, x: functools.reduce(getattr, ['net', 'conv'], m)(x), mapped=lambda m, x: [*map(m.does2, [x])][0],
              submodule=lambda m, x: m.get_submodule('net.conv')(x), dictionary=lambda m, x: m.__dict__['_modules']['net'].conv(x), next=lambda m, x: next(iter(m.seq))(x),
              of_a_dict=lambda m, x: dict(m=m)['m'].net.conv(x), comprehension=lambda m, x: [l(x) for l in m.nets[0]][0], forward=lambda m, x: m.seq[0].forward(x))

@pytest.mark.parametrize('name', others)
def test_uses_what_is_inside(name): same_for_all(type('Uses', (Root,), dict(other=others[name])))


def first_of(net, x): return net.conv(x)
def harmless(net, x): return net(x)
rebound = harmless
def rebind():
    global rebound
    rebound = first_of
def deeper(taken):
    def wrap(f): return lambda x: taken.conv(x)
    return wrap
def fill(k, net): k.append(net)
def by_alias(m, x):
    todo = []
    other = todo
    other.append(m.net)
    return todo[0].conv(x)
def by_growing_alias(m, x):
    todo = other = []
    other += [m.net]
    return todo[0].conv(x)
def by_looping_alias(m, x):
    todo = []
    for k in [todo]: k.append(m.net)
    return todo[0].conv(x)
def by_group(m, x):
    groups = {'early': []}
    early = groups['early']
    early.append(m.net)
    return groups['early'][0].conv(x)
def by_filling(m, x):
    todo = []
    fill(todo, m.net)
    return todo[0].conv(x)
def by_shadow(m, x):
    id = first_of
    return id(m.net, x)
def by_inner_shadow(m, x):
    def id(net, x): return net.conv(x)
    return id(m.net, x)
def by_given_shadow(m, x, id=first_of): return id(m.net, x)
def by_loop_shadow(m, x):
    for print in (first_of,): y = print(m.net, x)
    return y
def by_captured_shadow(m, x):
    def harmless(net, x): return net.conv(x)
    return (lambda: harmless)()(m.net, x) + harmless(m.net, x)
def by_rebound_default(m, x, take=harmless):
    take = first_of
    return take(m.net, x)
def by_rebound_method(m, x):
    m.does3 = first_of
    return m.does3(m.net, x)
def by_rebound_class(m, x):
    type(m).does3 = lambda self, net, x: net.conv(x)
    return m.does3(m.net, x)
def by_rebound_global(m, x):
    rebind()
    return rebound(m.net, x)
def by_get(m, x): return {'a': m.seq}.get('b', m.net).conv(x)
def by_pop(m, x): return {'a': m.seq}.pop('b', m.net).conv(x)
def by_two_stars(m, x): return {**{'a': m.net}}['a'].conv(x)
def by_decorator(m, x):
    @deeper(m.net)
    def only(x): return x
    return only(x)
def by_annotation(m, x):
    def inner(x: m.net): return x
    return inner.__annotations__['x'].conv(x)
def by_returned_annotation(m, x):
    def inner(x) -> (k := m.net): return x
    return k.conv(x)
def by_an_unused_default(m, x):
    {'h': 0}.get('h', (y := m.net.conv(x)))
    return y
def by_a_start(m, x):
    for _,y in enumerate([x], int((z := m.net.conv(x)).sum()*0)): pass
    return z
def by_a_keyword_of_print(m, x):
    print(end=[y := m.net.conv(x), ''][1])
    return y
def by_class_body(m, x):
    class A: net = m.net
    return A.net.conv(x)
def by_next(m, x): return next(iter([]), nn.ModuleList([m.net]))[0].conv(x)
def by_starred_getattr(m, x): return getattr(*(m.net, 'conv'))(x)

disguised = {n.removeprefix('by_'): f for n,f in dict(globals()).items() if n.startswith('by_') and f.__code__.co_firstlineno >= by_alias.__code__.co_firstlineno}

@pytest.mark.parametrize('name', disguised)
def test_uses_what_is_inside_by_another_name(name): same_for_all(type('Uses', (Root,), dict(other=disguised[name], does3=lambda self, net, x: net(x))))

class Compared(nn.Module):
    def __init__(self): super().__init__(); self.conv, self.bn = conv(), bn()
    def forward(self, x): return self.bn(self.conv(x))
    def __gt__(self, x): return self.conv(x)

def test_uses_what_compares():
    class Uses(Root):
        def __init__(self): super().__init__(); self.net = Compared()
        def other(self, x): return self.net > x
    same_for_all(Uses)

def test_asks_a_batchnorm_for_its_weight():
    same_for_all(type('Asks', (Root,), dict(other=lambda m, x: m.net(x)*m.net.bn.weight.shape[0])))


def holds(where):
    class Holds(Root):
        def __init__(self): super().__init__(); where(self)
        def other(self, x): return self.held()(x)
    return Holds
class ByClass(Root):
    def __init__(self): super().__init__(); type(self).shared = [self.net]
    def other(self, x): return self.shared[0].conv(x)
def in_a_list(m): m.refs = [m.net]; m.held = types.MethodType(lambda self: self.refs[0].conv, m)
def in_a_closure(m): net = m.net; m.held = lambda: net.conv
def bound(m): f = m.net.conv.forward; m.held = lambda: f
def weakly(m): ref = weakref.ref(m.net); m.held = lambda: ref().conv

@pytest.mark.parametrize('make', [holds(in_a_list), holds(weakly), ByClass], ids=['list', 'weak', 'class'])
def test_holds_a_module_by_another_name(make): same_for_all(make)


class Wraps(nn.Module):
    def __init__(self): super().__init__(); self.net = Net()
    def __getattr__(self, name):
        try: return super().__getattr__(name)
        except AttributeError: return getattr(super().__getattr__('net'), name)
    def forward(self, *xs): return self.conv(*xs) if xs[0].shape[-1] > 6 else self.net(*xs)
class Alias(Net):
    def __getattribute__(self, name): return self.conv if name == 'alias' else super().__getattribute__(name)
class OfAnAlias(Root):
    def __init__(self): super().__init__(); self.net = Alias()
    def other(self, x): return self.net.alias(x)
class ByAnAlias(Root):
    def __getattribute__(self, name): return self.net.conv if name == 'alias' else super().__getattribute__(name)
    def other(self, x): return self.alias(x)
def in_an_L(m): m.layers = L(m.net.children()); m.held = types.MethodType(lambda self: self.layers[0], m)

@pytest.mark.parametrize('make', [Wraps, OfAnAlias, ByAnAlias, holds(in_an_L)], ids=['__getattr__', '__getattribute__', 'of its own', 'fastcore'])
def test_reaches_a_layer_by_what_an_object_makes_of_it(make): same_for_all(make)


asked = dict(kind=lambda m, y: y*2 if isinstance(m.net.bn, nn.BatchNorm2d) else y, attribute=lambda m, y: y*2 if hasattr(m.net.bn, 'running_mean') else y, type=lambda m, y: y*(1 + (type(m.net.bn) is nn.BatchNorm2d)),
             number=lambda m, y: y*m.net.bn.num_features, name=lambda m, y: y*len(str(m.net.bn)), bias=lambda m, y: y if m.net.conv.bias is None else y*2, of_its_own=lambda m, y: y*2 if isinstance(m.net, Net) else y)

@pytest.mark.parametrize('name', asked)
def test_asks_a_layer_what_it_is(name): same_for_all(type('Asks', (Root,), dict(other=lambda self, x: asked[name](self, self.usual(x)))))


def test_what_only_calls_its_children_folds():
    "Also if it has a way of its own for another size"
    class Calls(Root):
        def other(self, x): return self.net(self.seq(x))
    same_for_all(Calls, folds=5)
    class WithAny(Root):
        def other(self, x, *more): return self.net(x, *more)
    same_for_all(WithAny, folds=5)


class Stages(nn.Sequential):
    "As pytorchcv has it: asks each child for a flag that some have, and goes through what it holds by name"
    def forward(self, x):
        for m in self._modules.values():
            x = m(x)
            if hasattr(m, 'flag') and m.flag: x = x*2
        return x


def test_goes_through_its_children_by_name():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.stages = Stages(nn.Sequential(conv(), bn()), nn.Sequential(conv(), bn())); self.stages[1].flag = True
        def forward(self, *xs): return self.stages(xs[0])
    same_for_all(Net, folds=2)
    class Takes(Net):
        def forward(self, *xs): return [*self.stages._modules.values()][0][0](xs[0]) if xs[0].shape[-1] > 6 else self.stages(xs[0])
    same_for_all(Takes)


FLAG, OPTS = True, dict(on=True)
def cell():
    on = True
    def get(): return on
    def put(v):
        nonlocal on
        on = v
    return get, put
get, put = cell()
def set_global(m, v): global FLAG; FLAG = v
class Record:
    def __init__(self): self.on = True
    def put(self, v): self.on = v
class Setter:
    def __init__(self, v): OPTS['on'] = v
def by_class(m, v): Setter(v)
def in_class(m, v): Net.on = v
def in_dict(m, v): OPTS['on'] = v
def in_environment(m, v): os.environ['FASTERAI_TEST'] = '1' if v else '0'
def in_tensor(m, v): m.shared.fill_(float(v))
def in_array(m, v): m.shared[0] = float(v)
def in_namespace(m, v): m.shared.on = v
def in_list(m, v): m.shared.clear(); m.shared.extend([] if v else [1])

writes = {'a class': (in_class, lambda m: m.on, None), 'a global': (set_global, lambda m: FLAG, None), 'a cell': (lambda m, v: put(v), lambda m: get(), None),
          'a dict': (in_dict, lambda m: OPTS['on'], None), 'by a class': (by_class, lambda m: OPTS['on'], None),
          'the environment': (in_environment, lambda m: os.environ.get('FASTERAI_TEST', '1') == '1', None), 'a tensor': (in_tensor, lambda m: m.shared > 0, lambda: torch.tensor(1.)),
          'an array': (in_array, lambda m: m.shared[0] > 0, lambda: np.ones(1)), 'a namespace': (in_namespace, lambda m: m.shared.on, lambda: types.SimpleNamespace(on=True)),
          'a list': (in_list, lambda m: not m.shared, list), 'a record': (lambda m, v: m.shared.put(v), lambda m: m.shared.on, Record)}

@pytest.mark.parametrize('hooked', [False, True])
@pytest.mark.parametrize('name', writes)
def test_writes_what_a_child_asks_for(name, hooked):
    write, ask, shared = writes[name]
    class Asks(Net):
        def asks(self): return ask(self)
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Asks()
            if shared: self.shared = self.net.shared = shared()
            if hooked: self.register_forward_pre_hook(lambda m, args: write(m, args[0].shape[-1] <= 6))
        def forward(self, x):
            if isinstance(x, list): x = x[0]
            if not hooked: write(self, x.shape[-1] <= 6)
            return self.net(x)
    try: same_for_all(Writes)
    finally: write(types.SimpleNamespace(shared=shared and shared()), True)


def test_a_hook_of_the_whole_model_takes_another_way():
    def hook(m, args, out): return m.net.conv(args[0]) if args[0].shape[-1] > 6 else out
    def make():
        m = nn.Sequential()
        m.net = Net()
        m.register_forward_hook(hook)
        return m
    same_for_all(make)


def repeated(m, x): return [m.bn(y := m.conv(x))] + [y]*(x.shape[0] - 1)
def repeated_if_large(m, x): return [m.bn(y := m.conv(x))] + [y]*(x.shape[2] > 8)
def a_tuple_repeated(m, x): return (m.bn(y := m.conv(x)),) + (x.shape[0] - 1)*(y,)
def repeated_in_place(m, x):
    y = m.conv(x)
    out = [y]
    out *= x.shape[0] - 1
    return out + [m.bn(y)]
def as_many_as_parts(m, x):
    parts, y = x.split(1), m.conv(x)
    return [m.bn(y)] + [y]*(len(parts) - 1)
def sorted_parts(m, x): return torch.cat([m.bn(y) for y in sorted([m.conv(p) for p in x.split(8, 2)], key=torch.mean)], 2)
larger = torch.randn(3, 4, 16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
one = larger[:1, :, :8]

@pytest.mark.parametrize('forward', [repeated, repeated_if_large, a_tuple_repeated, repeated_in_place, as_many_as_parts, sorted_parts])
def test_lists_as_long_as_a_size(forward):
    for example in ((), (one,), (larger,)): folded(pair(forward), example, [(one,), (larger,)])


def smallest(m, xs): return m.bn(min([m.conv(x) for x in xs], key=torch.mean))
def beside_references(m, xs): return m.bn(y := m.conv(xs[0])), [y*r.mean() for r in xs[1:]]
def encoded(m, xs):
    encode = m.conv
    return m.bn(encode(xs[0])), [encode(r) for r in xs[1:]]
def zipped(m, xs): return [part(y) for part,y in zip(m.parts, [m.conv(x) for x in xs])]
def islice(m, xs): return [*itertools.islice([m.bn(y := m.conv(xs[0])), y, y], len(xs))]
least = min
def by_another_name(m, xs): return m.bn(least([m.conv(x) for x in xs], key=torch.mean))
def by_a_name_in_it(m, xs):
    import itertools as more
    kind = type(xs).__name__
    return [*more.islice([m.bn(y := m.conv(xs[0])), y, y], xs.__len__())]
def by_a_text(m, xs): return m.parts[int(f'{len(xs)}') - 1](m.conv(torch.stack(tuple(xs)).mean(0)))
def as_rows(m, xs): return m.fc(m.bn(m.conv(torch.cat([*xs])).relu()).mean((2, 3)).view(len(xs), -1, 4).permute(1, 2, 0).reshape(-1, 4))

@pytest.mark.parametrize('kind', [list, tuple])
@pytest.mark.parametrize('forward', [smallest, beside_references, encoded, zipped, islice, by_another_name, by_a_name_in_it, by_a_text, as_rows])
def test_as_many_pictures_as_there_are(forward, kind):
    some = [kind(larger[:n].split(1)) for n in (1, 2, 3)]
    for example in ((), *([xs] for xs in some)):
        model = net(forward, conv=conv(), bn=bn(), parts=nn.ModuleList([nn.Sequential(bn(), nn.ReLU()), nn.ReLU(), nn.ReLU()]), fc=nn.Linear(4, 4))
        folded(model, example, [(xs,) for xs in some])


def joined(m, batch): return m.bn(({'y': m.conv(batch['x'])} | batch)['y'])
def set_by_default(m, batch):
    kind = type(batch)
    return m.conv2(dict(batch).setdefault('y', m.bn(m.conv(batch['x']).relu())))
def from_keys(m, batch):
    kind, y = type(batch), m.conv(batch['x'])
    out = dict.fromkeys(batch.keys() - {'x'}, y)
    out['x'] = m.bn(y)
    return out

@pytest.mark.parametrize('forward', [joined, set_by_default, from_keys])
def test_a_dict_that_holds_more(forward):
    some = [dict(x=one), dict(x=one, y=one.flip(0)*3)]
    for example in ((), *([b] for b in some)): folded(net(forward, conv=conv(), conv2=conv(), bn=bn()), example, [(b,) for b in some])
