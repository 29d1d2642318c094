"What a stand-in can't pretend to be, and what is left where nobody looked for it: each was once folded, wrongly."
import functools, operator, sys, types, weakref

import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.fold.verify import difference, run
from fasterai.misc.bn_folding import BN_Folder
from helpers import net, randomise
from test_ways import bn, conv, folded, odd, pair, x

one, low = x[:1], x.float()
class Picture(Tensor): meta = 'own'
def picture(x): return x.as_subclass(Picture)
examples = pytest.mark.parametrize('example', [False, True], ids=['symbolic', 'example'])


def in_a_set(m, x, n): return m.conv(x) if n.item() in {1, 2} else m.bn(m.conv(x))
def in_a_dict(m, b):
    k = {'mri': .5}.get(b['domain'])
    return m.conv(b['x'])*k if k else m.bn(m.conv(b['x']))
def in_a_module_dict(m, b):
    y = m.conv(b['x'])
    return m.norms[b['domain']](y) if b['domain'] in m.norms else m.bn(y)
def of_a_name(m, x): return m.conv(x.double()) if x.type() in {'torch.FloatTensor'} else m.bn(m.conv(x.double()))
def of_itself(m, x):
    y = m.conv(x)
    return m.bn(y) if len({y, y.contiguous()}) == 2 else y
def of_a_weight(m, x): return m.conv(x) if m.conv.weight in m.frozen else m.bn(m.conv(x))
def by_numpy(m, x): return m.conv(torch.from_numpy(x.numpy()[:, ::-1].copy())) if x.shape[0] > 1 else m.bn(m.conv(x))
def by_an_assertion(m, x):
    if x.shape[0] > 1:
        a = x.numpy()
        assert isinstance(a, np.ndarray)
        return m.conv(torch.from_numpy(a))
    return m.bn(m.conv(x))
def by_an_error(m, x):
    try: a = x.numpy().copy()
    except AttributeError: return m.bn(m.conv(x))
    return m.conv(torch.from_numpy(a))
def of_an_item(m, x): return m.conv(x) if isinstance(x.max().item(), float) else m.bn(m.conv(x))
def of_a_subclass(m, x):
    y = m.conv(x)
    return y if isinstance(y, Picture) else m.bn(y)
def of_what_it_has(m, x):
    y = m.conv(x)
    return y if hasattr(y, 'meta') else m.bn(y)
def of_a_product(m, x): return m.conv(x) if isinstance(x.shape[-1]*m.scale, float) else m.bn(m.conv(x))
def of_what_a_product_has(m, x): return m.conv(x) if hasattr(x.shape[-1]*m.scale, 'hex') else m.bn(m.conv(x))
def of_a_mark(m, x):
    y = m.conv(x)
    y.raw = True
    y = F.relu(y, inplace=True)
    return y if hasattr(y, 'raw') else m.bn(y)
def of_several(m, x):
    e = torch.linalg.eigh(x @ x.mT)
    return m.conv(x) if isinstance(e, tuple) else m.bn(m.conv(x))
def of_a_flag(m, x, features=False): return m.conv(x) if features == 'pre' else m.bn(m.conv(x))
def of_a_flags_kind(m, x, features=False): return m.conv(x) if isinstance(features, str) else m.bn(m.conv(x))
def of_a_device(m, x): return m.conv(x) if str(x.device) == 'cpu' else m.bn(m.conv(x))
def in_devices(m, x): return m.conv(x) if str(x.device) in ('cpu', 'mps') else m.bn(m.conv(x))
def starts_like(m, x): return m.conv(x) if str(x.device).startswith('cpu') else m.bn(m.conv(x))
def tried(m, x, w):
    y = m.conv(x)
    try: x + w
    except (RuntimeError, torch.OutOfMemoryError): return y
    return m.bn(y)

batches = [(dict(x=x, domain=d),) for d in ('ct', 'mri')]
pretended = {f.__name__: (f, calls) for f,calls in [
    (in_a_set, [(x, torch.tensor(n)) for n in (0, 1)]), (in_a_dict, batches), (in_a_module_dict, batches), (of_a_name, [(x,), (low,)]), (of_itself, [(x,)]), (of_a_weight, [(x,)]),
    (by_numpy, [(one,), (x,)]), (by_an_assertion, [(one,), (x,)]), (by_an_error, [(x,)]), (of_an_item, [(x,)]), (of_a_subclass, [(x,), (picture(x),)]), (of_what_it_has, [(x,), (picture(x),)]),
    (of_a_product, [(x,)]), (of_what_a_product_has, [(x,)]), (of_a_mark, [(x,)]), (of_several, [(x,)]), (of_a_flag, [(x,), (x, 'pre')]), (of_a_flags_kind, [(x,), (x, 'pre')]), (of_a_device, [(x,)]), (in_devices, [(x,)]), (starts_like, [(x,)]),
    (tried, [(x, torch.ones(8)), (x, torch.ones(7))])]}

@examples
@pytest.mark.parametrize('name', pretended)
def test_what_a_stand_in_cant_pretend(name, example):
    forward,calls = pretended[name]
    model = randomise(pair(forward, norms=nn.ModuleDict({'mri': bn()})))
    model.scale, model.frozen = 2., {model.conv.weight}
    folded(model, calls[0] if example else (), calls)

def test_a_device_as_a_key():
    "The bias of an attention is kept for each"
    def keeps(m, x):
        k = str(x.device)
        if k not in m.kept: m.kept[k] = m.scale*2
        return m.bn(m.conv(x))*m.kept[k]
    for kept in ({}, {'cpu': 4.}):
        model = pair(keeps)
        model.scale, model.kept = 2., kept
        assert folded(model, (), [(x,), (odd,)]).folded == 1

def test_more_parts_than_a_stand_in_knows():
    "are no reason to keep anything where no way goes by them"
    def shows(m, x): return m.bn(m.conv(x)) + torch.finfo(x.dtype).eps*x.element_size()
    assert folded(pair(shows), (), [(x,), (odd,)]).folded == 1


STATE, WEAKLY, N = dict(n=0), weakref.WeakKeyDictionary(), 0
class Numbers(np.ndarray): pass
@functools.lru_cache
def state(): return {'n': 0}
@functools.lru_cache
def setting(): return {'late': True}
def partial_of(n): return n
def of_a_cache(m):
    state()['n'] += 1
    return state()['n']
def weakly(m):
    WEAKLY[m] = WEAKLY.get(m, 0) + 1
    return WEAKLY[m]
def in_an_array(m):
    m.numbers[0] += 1
    return m.numbers[0]
def by_globals(m):
    globals()['N'] += 1
    return N
def in_this_module(m):
    here = sys.modules[__name__]
    here.N = here.N + 1
    return N
def of_a_partial(m):
    m.partial.n = getattr(m.partial, 'n', 0) + 1
    return m.partial.n
def of_a_parameter(m):
    m.conv.weight.n = getattr(m.conv.weight, 'n', 0) + 1
    return m.conv.weight.n

@examples
@pytest.mark.parametrize('count', [of_a_cache, weakly, in_an_array, by_globals, in_this_module, of_a_partial, of_a_parameter])
def test_counts_where_nobody_looked(count, example):
    global N
    N = 0
    def again():
        state.cache_clear()
        torch.manual_seed(0)
        model = randomise(pair(lambda m, x: m.bn(m.conv(x)) if count(m) <= 6 else m.conv(x)))
        model.numbers, model.partial = np.zeros(1).view(Numbers), functools.partial(partial_of)
        return model
    new = BN_Folder().fold(again(), *([x] if example else []))
    N = 0
    state.cache_clear()
    WEAKLY.clear()
    if count is of_a_parameter and hasattr(new.conv.weight, 'n'): del new.conv.weight.n
    got = [new(x) for _ in range(9)]
    N, model = 0, again()
    for y in got: torch.testing.assert_close(y, model(x), rtol=1e-9, atol=1e-9)

def test_a_cached_setting_is_as_it_is():
    "and not as it was made"
    setting()['late'] = False
    model = pair(lambda m, x: m.conv(x) if setting()['late'] else m.bn(m.conv(x)))
    assert folded(model, (), [(x,)]).folded == 1
    setting.cache_clear()

@pytest.mark.parametrize('count', [weakly, in_an_array, by_globals])
def test_what_was_counted_is_put_back(count):
    global N
    model = randomise(pair(lambda m, x: m.bn(m.conv(x))*count(m)))
    model.numbers, WEAKLY[model], N = np.zeros(1).view(Numbers), 0, 0
    BN_Folder().plan(model, x)
    assert (N, WEAKLY[model], model.numbers[0]) == (0, 0, 0)


class Hidden(nn.Module):
    "Can't be followed: what it calls is not registered"
    skip = None
    def __init__(self, reads): super().__init__(); self.held, self.reads = [conv().double()], reads
    def forward(self, y): return self.held[0](y) + self.reads(self)
LEFT = {}
def sets(m, x):
    y = m.conv(x)
    m.child.skip = y
    y = m.child(m.bn(y))
    m.child.skip = None
    return y
def leaves(m, x):
    LEFT['y'] = m.conv(x)
    y = m.child(m.bn(LEFT['y']))
    LEFT.clear()
    return y
def hands_itself(m, x):
    m.child.skip = [m]
    y = m.child(x)
    m.child.skip = None
    return y + m.bn(m.conv(x))

@examples
@pytest.mark.parametrize('forward,reads', [(sets, lambda c: c.skip), (leaves, lambda c: LEFT['y']), (hands_itself, lambda c: c.skip[0].conv(x))], ids=['attribute', 'global', 'itself'])
def test_what_is_left_for_a_child(forward, reads, example):
    torch.manual_seed(0)
    folded(pair(forward, child=Hidden(reads)), (x,) if example else (), [(x,)])

@examples
def test_what_is_kept_on_the_input(example):
    def marks(m, x):
        x.before = m.conv(x)
        return m.bn(x.before)
    def reads(m, x): return m.child.held[0](m.block(x)) + x.before
    torch.manual_seed(0)
    folded(net(reads, block=pair(marks), child=Hidden(lambda c: 0)), (x,) if example else (), [(x,)])


def of_a_function(m): holder.layer = m.conv
def holder(x): return holder.layer(x)
def in_a_weak_set(m): m.held = weakref.WeakSet([m.conv])
def in_a_namespace(m):
    m.held = types.ModuleType('held')
    m.held.layer = m.conv

@pytest.mark.parametrize('holds,use', [(of_a_function, lambda m, x: holder(x)), (in_a_weak_set, lambda m, x: [*m.held][0](x)), (in_a_namespace, lambda m, x: m.held.layer(x))], ids=['function', 'weak set', 'module'])
def test_held_where_nobody_looked(holds, use):
    def hides(m, x):
        try: return m.block(x) + use(m, x)
        except ValueError: return x
    model = randomise(net(hides, block=pair(lambda m, x: m.bn(m.conv(x))), conv=nn.Identity()))
    model.conv = model.block.conv
    del model._modules['conv']
    object.__setattr__(model, 'conv', model.block.conv)
    holds(model)
    object.__delattr__(model, 'conv')
    want = run(model, (x,), {})
    BN_Folder().fold(model, inplace=True)
    assert difference(want, run(model, (x,), {})).relative < 1e-12
