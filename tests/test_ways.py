"What a `forward` may do on another call than the one that is seen: each was once folded, wrongly."
import collections, functools, gc, inspect, math, random, weakref

import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn

from fasterai.fold.verify import difference, run
from fasterai.misc.bn_folding import BN_Folder
from helpers import Net, fold, net, norms, randomise

x = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
odd = torch.randn(2, 4, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
def conv(o=4, **kw): return nn.Conv2d(4, o, 3, **{'padding': 1, **kw})
def bn(): return nn.BatchNorm2d(4)
def pair(forward, **more): return net(forward, conv=conv(), bn=bn(), **more)
def same(model, new, calls):
    for args in calls: assert difference(run(model, args, {}), run(new, args, {})).relative < 1e-12
def folded(model, example, calls):
    "The report of a fold that gives what `model` gives for every one of `calls`"
    folder = BN_Folder()
    same(model, folder.fold(model, *example), calls)
    return folder.report


class Up(nn.Module):
    "Pads what does not fit, between its layer and its BatchNorm"
    def __init__(self): super().__init__(); self.up, self.bn = nn.ConvTranspose2d(4, 4, 2, 2), bn()
    def forward(self, x, skip):
        x = self.up(x)
        more = [skip.shape[d] - x.shape[d] for d in (3, 2)]
        if any(n != 0 for n in more): x = F.pad(x, (0, more[0], 0, more[1]))
        return self.bn(x).relu() + skip
def of_a_list(m, x):
    if isinstance(x, (list, tuple)): x = torch.stack([*x])
    return m.up(F.max_pool2d(x, 2), x)
def of_what_may_fail(m, x):
    try: return m.up(F.max_pool2d(x, 2), x)
    except ValueError: return x


@pytest.mark.parametrize('forward', [of_a_list, of_what_may_fail])
def test_a_child_that_chooses_in_a_parent_that_cannot_be_followed(forward):
    for example in ((), (x,)): folded(net(forward, up=Up()), example, [(x,), (odd,)])


def skipped(m, x, skip): return m.conv(x).relu() if skip is None else m.bn(m.conv(x)) + skip
def masked(m, batch):
    y = m.conv(batch['x'])
    return y if batch['mask'] is None else m.bn(y)*batch['mask']
def flagged(m, x, on=True):
    y = m.conv(x)
    return y if on is None else m.bn(y)
def of_a_tensor(m, x): return m.bn(m.conv(x)) if isinstance(x, torch.Tensor) else m.conv(x[0])
def of_what_is_one(m, x): return m.bn(m.conv(x)) if torch.is_tensor(x) else m.conv(x[0])
def with_a_mask(m, x): return m.conv(x.x) if hasattr(x, 'mask') else m.bn(m.conv(x))
Nested = collections.namedtuple('Nested', 'x mask')
def of_one_inside(m, batch): return m.conv(batch['x'].x) if hasattr(batch['x'], 'x') else m.bn(m.conv(batch['x']))
def of_one_tried(m, batch):
    try: return m.conv(batch['x'].x)
    except AttributeError: return m.bn(m.conv(batch['x']))
def of_a_tensor_inside(m, batch): return m.bn(m.conv(batch['x'])) if isinstance(batch['x'], torch.Tensor) else m.conv(batch['x'].x)


@pytest.mark.parametrize('forward, calls', [
    (skipped, [(x, x), (x, None)]), (masked, [({'x': x, 'mask': x},), ({'x': x, 'mask': None},)]), (flagged, [(x,), (x, None)]),
    (of_a_tensor, [(x,), ([x],)]), (of_what_is_one, [(x,), ([x],)]), (with_a_mask, [(x,), (Nested(x, None),)]),
    *((f, [({'x': x},), ({'x': Nested(x, None)},)]) for f in (of_one_inside, of_one_tried, of_a_tensor_inside))], ids=lambda o: getattr(o, '__name__', ''))
def test_inputs_of_another_kind(forward, calls):
    for example in ((), calls[0]): folded(pair(forward), example, calls)


def by_domain(m, batch): return m.norms[batch['domain']](m.conv(batch['x']))
def of_all_that_is_there(m, xs): return m.bn(sum(m.layers[k](v) for k, v in xs.items()))
def pyramid(m, xs):
    y = m.conv(xs[-1])
    for f in xs[:-1]: y = y.relu() + f
    return m.bn(y)
def of_a_chunk(m, x, i=0): return m.bn(m.wide(x).chunk(2, 1)[i])
def padded_by_size(m, x): return m.bn(F.avg_pool2d(m.conv(x), 2, 2, (x.shape[2]%2, x.shape[3]%2)))
def padded_by_mode(m, x, mode='reflect'): return m.deaf(F.pad(m.bn(x), (1, 1, 1, 1), mode=mode))


@pytest.mark.parametrize('forward, calls', [
    (by_domain, [({'x': x, 'domain': 'a'},), ({'x': x, 'domain': 'b'},)]), (of_all_that_is_there, [({'a': x, 'b': x},), ({'a': x},)]), (pyramid, [([x],), ([x, x],)]),
    (of_a_chunk, [(x,), (x, 1)]), (padded_by_size, [(x,), (odd,)]), (padded_by_mode, [(x,), (x, 'constant')])], ids=lambda o: getattr(o, '__name__', ''))
def test_choices_without_an_if(forward, calls):
    for example in ((), calls[0]):
        model = pair(forward, wide=conv(8), deaf=conv(padding=0), norms=nn.ModuleDict(dict(a=bn(), b=bn())), layers=nn.ModuleDict(dict(a=conv(), b=conv())))
        folded(model, example, calls)


def images(batch): return torch.stack([*batch['images']])
by_a_number = dict(
    part=(lambda m, b: m.bn(m.wide(images(b))[:, b['n']:b['n']+4]), 0, 4), narrow=(lambda m, b: m.bn(m.wide(images(b)).narrow(1, b['n'], 4)), 0, 4), shuffle=(lambda m, b: m.bn(F.channel_shuffle(m.conv(images(b)), b['n'])), 1, 2),
    mode=(lambda m, b: m.deaf(F.pad(m.bn(images(b)), (1, 1, 1, 1), mode=b['n'])), 'reflect', 'constant'), drop=(lambda m, b: m.bn(F.dropout(m.conv(images(b)), 1., training=b['n'])), False, True),
    transposed=(lambda m, b: m.bn(m.conv(images(b)).transpose(2, b['n'])), 3, 1), key=(lambda m, b: m.bn(sorted([m.conv(images(b)), m.conv2(images(b))], key=b['n'])[0]), lambda t: 0, lambda t: -t.sum()),
    bias=(lambda m, b: m.bn(F.conv2d(images(b), m.conv.weight, b['n'])), None, torch.ones(4, dtype=torch.float64)))


@pytest.mark.parametrize('name', by_a_number)
def test_a_number_in_the_input_of_what_cannot_be_followed(name):
    forward, *values = by_a_number[name]
    for given in values:
        model = net(forward, conv=conv(), conv2=conv(), bn=bn(), wide=conv(8), deaf=conv(padding=0))
        folded(model, (dict(images=[*x[:, :, :4, :4]]*2, n=given),), [(dict(images=[*x[:, :, :4, :4]]*2, n=n),) for n in values])


def far(x): return float(x.abs().max()) > 1e3
class Features(Net):
    def features(self, x): return self.conv(x)
def by_index(m, x): return m.seqs[0][0](x) if far(x) else m.seqs[0](x)
def by_slice(m, x):
    for s in m.seqs: x = s[:1](x) if far(x) else s(x)
    return x
def by_method(m, x):
    for b in m.blocks: x = b.features(x) if far(x) else b(x)
    return x


def raw(f):
    "A decorator that takes more than it shows"
    @functools.wraps(f)
    def wrapper(self, *args, **kw): return self.conv(*args) if kw.pop('raw', False) else f(self, *args, **kw)
    return wrapper
def switch(f):
    @functools.wraps(f)
    def wrapper(self, x, raw=False): return self.conv(x) if raw else f(self, x)
    return wrapper
def shown(f): f.__signature__ = inspect.signature(lambda self, x: x); return f
def handed_on(f):
    @functools.wraps(f)
    def wrapper(*args, **kw): return f(*args, **kw)
    return wrapper
def hidden(m, x, raw=False): return m.conv(x) if raw else m.bn(m.conv(x))
def plain(m, x): return m.bn(m.conv(x))
def collecting(m, x, *_, **unused): return m.bn(m.conv(x))
def by_the_local_names(m, x, **kw): return m.conv(x) if locals()['kw'].get('raw') else m.bn(m.conv(x))


@pytest.mark.parametrize('forward', [raw(plain), switch(plain), raw(handed_on(plain)), handed_on(switch(plain)), shown(hidden), handed_on(hidden), by_the_local_names])
def test_what_a_decorator_takes(forward):
    for example in ((), (x,)):
        model, folder = pair(forward), BN_Folder()
        new = folder.fold(model, *example)
        for kw in ({}, dict(raw=True)): assert difference(run(model, (x,), kw), run(new, (x,), kw)).relative < 1e-12


@pytest.mark.parametrize('forward', [handed_on(plain), torch.no_grad()(plain), handed_on(handed_on(collecting)), collecting])
def test_what_a_forward_collects_and_nobody_looks_at(forward):
    for example in (True, False): assert fold(pair(forward), x, example=example)[1].folded == 1


def joined(m, x, more=None): return torch.cat([m.bn(m.conv(x)), more], 1)
def cast(m, x, more=None): return m.bn(m.conv(x)).relu() + more.to(x.dtype)
def required(m, x, more=None):
    if more is None: raise ValueError('more is needed')
    return m.bn(m.conv(x)) + more
def required_when_large(m, x, more=None):
    if x.sum() > x.numel(): m.check(x, 'tensor' if more is None else more)
    return m.conv(x) if more is None else m.bn(m.conv(x))
def refused_by_what_it_catches(m, x, more=None):
    if more is not None: return m.bn(m.conv(x))
    try: n = np.ones(2)*np.asarray(x.detach()).ndim
    except TypeError as e: raise ValueError('not for tensors') from e
    return m.conv(x)*float(n[0])

@pytest.mark.parametrize('forward,folds', [(joined, 1), (cast, 1), (required, 1), (required_when_large, 0), (refused_by_what_it_catches, 0)])
def test_an_argument_that_may_be_left_out_and_is_needed(forward, folds):
    for example in ((), (x, x)):
        model, folder = pair(forward, check=OfOneMode()), BN_Folder()
        same(model, folder.fold(model, *example), [(x, x), (x,)][:2 - folds])
        assert folder.report.folded == folds


class Fails(nn.Module):
    "as it is, where there is no mask"
    def forward(self, x, mask): return x*mask.to(x.dtype)
class Filled(nn.Module):
    def forward(self, x, mask):
        if mask is None: raise ValueError('a mask is needed')
        return x*mask
def filled(m, args): return (args[0], torch.ones_like(args[0]) if args[1] is None else args[1])

def after_another_call(m, x, more=None):
    if more is not None: m.seen = True
    elif not m.seen: raise RuntimeError('not ready')
    return m.conv(x) if more is None else m.bn(m.conv(x)) + more
def by_what_another_call_left(m, x, more=None):
    if more is None: return m.conv(x)*(m.size + 1)
    m.size = 2
    return m.bn(m.conv(x)) + more
def after_some_calls(m, x, more=None):
    if more is None:
        m.n += 1
        if m.n < 2: raise RuntimeError('warming up')
        return m.conv(x)
    return m.bn(m.conv(x)) + more
def by_chance(m, x, more=None):
    if more is None:
        if random.random() < .9: raise RuntimeError('not now')
        return m.conv(x)
    return m.bn(m.conv(x)) + more
def by_what_a_parent_catches(m, x, more=None):
    y = m.conv(x)
    try: return m.fails(m.bn(y), more)
    except AttributeError: return y
def by_a_default_of_getattr(m, x, more=None):
    y = m.conv(x)
    class View: out = property(lambda self: m.fails(m.bn(y), more))
    return getattr(View(), 'out', y)
def by_a_hook_on_a_child(m, x, more=None):
    y = m.conv(x)
    return m.bn(m.filled(y, None).relu()) if more is None else m.bn(y) + more
def by_a_state_that_is_set(m, x, more=None):
    if more is not None:
        m.seen = True
        return m.bn(m.conv(x)) + more
    return m.conv(x) if m.seen else m.bn(m.conv(x))

def outcome(m, args, seed):
    random.seed(seed)
    try: return m(*args)
    except (RuntimeError, TypeError): return None

@pytest.mark.parametrize('forward', [after_another_call, by_what_another_call_left, after_some_calls, by_chance, by_what_a_parent_catches, by_a_default_of_getattr, by_a_hook_on_a_child, by_a_state_that_is_set])
def test_a_way_that_fails_now_and_not_always(forward):
    "or not in that way, after a call of another kind"
    for example in ((), (x, x)):
        model = pair(forward, fails=Fails(), filled=Filled(), seen=False, size=None, n=0)
        model.filled.register_forward_pre_hook(filled)
        new = BN_Folder().fold(model, *example)
        for seed, args in enumerate([(x, x), *[(x,)]*20]):
            want, got = (outcome(m, args, seed) for m in (model, new))
            assert want is got is None or difference(want, got).relative < 1e-12


class Picky(nn.Module):
    error = AttributeError
    def forward(self, x):
        if x.sum() > 0: raise self.error('not for those')
        return x.relu()
class NotInstalled(Picky): error = ImportError
def caught(m, x):
    y = m.conv(x)
    try: return m.picky(m.bn(y))
    except AttributeError: return y
def caught_where_it_is_imported(m, x):
    y = m.conv(x)
    try: return m.picky(m.bn(y))
    except ImportError: return y
@pytest.mark.parametrize('forward,picky', [(caught, Picky), (caught_where_it_is_imported, NotInstalled)])
def test_an_error_in_some_way_that_a_parent_catches(forward, picky):
    for example in ((), (x,)): folded(pair(forward, picky=picky()), example, [(x,), (-x,), (x + 9,), (x - 9,)])


def by_a_mode(m, x, mode='tensor'):
    if mode == 'tensor': return m.bn(m.conv(x)).relu()
    if mode == 'features': return m.bn(m.conv(x))
    raise ValueError(f'unknown mode {mode}')
class OfOneMode(nn.Module):
    def forward(self, x, mode):
        if mode != 'tensor': raise ValueError(mode)
        return x
def none_refused_when_large(m, x, mode='tensor'):
    if x.sum() > x.numel(): x = m.check(x, mode)
    return m.conv(x) if mode is None else m.bn(m.conv(x))
def none_refused_next_time(m, x, mode='tensor'):
    if mode is not None: return m.bn(m.conv(x))
    if m.seen: raise ValueError(mode)
    m.seen = True
    return m.conv(x)


@pytest.mark.parametrize('forward,mode,folds', [(by_a_mode, 'features', 1), (none_refused_when_large, None, 0), (none_refused_next_time, None, 0)])
def test_an_argument_that_may_not_be_none(forward, mode, folds):
    for example in ((), (x,)):
        model = pair(forward, check=OfOneMode(), seen=False)
        folder = BN_Folder()
        new = folder.fold(model, *example)
        same(model, new, [(x,), (x, mode)])
        assert folder.report.folded == folds


def test_a_run_of_what_cannot_be_followed_says_why():
    folder = BN_Folder()
    folder.fold(pair(lambda m, x: torch.stack([m.next(y) for y in m.bn(m.conv(x))]), next=conv(padding=0)), x)
    assert folder.report['bn'].why == "before it and after it: another input may take another way through the model, whose code can't be followed: it loops over its input"


def of_a_list_or_not(m, x): return m.bn(m.conv(x[0] if isinstance(x, (list, tuple)) else x))
def of_one_or_more(m, x): return m.bn(m.conv(torch.cat(x) if not torch.is_tensor(x) else x))
def sum_of_two(m, x):
    x, more = x if isinstance(x, tuple) else (x, None)
    y = m.conv(x)
    return m.bn(y if more is None else y + more)


@pytest.mark.parametrize('forward, folds', [(of_a_list_or_not, True), (of_one_or_more, True), (sum_of_two, False)])
def test_a_list_instead_of_a_tensor(forward, folds):
    for example in ((), (x,)): assert folded(pair(forward), example, [(x,), ((x, x),)]).folded == folds


act, drop = nn.ReLU(), nn.Dropout(1.) # in training mode
net_outside = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).double()
def hooked(m, x):
    s = nn.Sequential(m.conv, nn.ReLU())
    s.register_forward_hook(lambda m, i, o: o*2)
    return m.bn(s(x))


@pytest.mark.parametrize('forward, folds', [
    (lambda m, x: nn.Sequential(m.conv, m.bn)(x), 1), (lambda m, x: nn.ReLU()(m.bn(m.conv(x))), 1), (lambda m, x: act(m.bn(m.conv(x))), 1),
    (lambda m, x: m.bn(nn.AvgPool2d(2)(m.conv(x))), 1), (lambda m, x: m.net[2:](m.net[:2](x)), 2), (lambda m, x: m.bn(m.conv(nn.Upsample(size=x.shape[2:])(F.max_pool2d(x, 2)))), 1),
    (lambda m, x: m.bn(act(m.conv(x))), 0), (lambda m, x: m.bn(nn.AvgPool2d(3, padding=1)(m.conv(x))), 0), (lambda m, x: (m.net[:1](x), m.net[:2](x)), 1),
    (lambda m, x: m.bn(drop(m.conv(x))), 0), (lambda m, x: m.bn(net_outside(m.conv(x))), 0), (hooked, 0)])
def test_modules_that_are_no_part_of_the_model(forward, folds):
    for example in (True, False):
        model = net(forward, **(dict(net=nn.Sequential(conv(), bn(), conv(), bn())) if 'net' in forward.__code__.co_names else dict(conv=conv(), bn=bn())))
        assert fold(model, x, example=example)[1].folded == folds


@pytest.mark.parametrize('forward', [by_index, by_slice, by_method])
def test_what_a_list_holds_is_reached_into(forward):
    model = net(forward, seqs=nn.ModuleList([nn.Sequential(conv(), bn())]), blocks=nn.ModuleList([net(lambda m, x: m.bn(m.conv(x)), Features, conv=conv(), bn=bn())]))
    folded(model, (x,), [(x,), (x*1e4,)])


def by_an_f_string(m, x): return getattr(getattr(m, f'block{0}'), 'conv')(x) if far(x) else m.block0(x)
def by_a_sum(m, x): return getattr(getattr(m, 'block' + str(0)), 'conv')(x) if far(x) else m.block0(x)
def by_one_of_two(m, x): return getattr(getattr(m, 'block0' if x.ndim == 4 else 'other'), 'conv')(x) if far(x) else m.block0(x)


@pytest.mark.parametrize('forward', [by_an_f_string, by_a_sum, by_one_of_two])
def test_a_name_that_is_computed(forward):
    model = net(forward, block0=net(lambda m, x: m.bn(m.conv(x)), Features, conv=conv(), bn=bn()))
    folded(model, (x,), [(x,), (x*1e4,)])


def test_nothing_holds_a_model_that_was_traced():
    model = pair(lambda m, x: m.bn(m.conv(x)) if int(x.sum()) else x)
    BN_Folder().fold(model)
    ref = weakref.ref(model)
    del model
    gc.collect()
    assert ref() is None


class Author(nn.Module):
    "Has methods that its `forward` never comes to, as those of libraries have"
    def __init__(self): super().__init__(); self.encoder = nn.Sequential(conv(), bn()); self.kind = None
    def forward(self, x, **kw): return self.scaled(self.encoder(x, **kw))*getattr(self, 'factor', 1)
    @staticmethod
    def scaled(x): return by_far(x)
    def fuse(self): return [m for m in self.modules()], self.encoder[0].weight
def by_far(x): return x*2


def test_methods_that_nobody_calls():
    assert folded(randomise(Author()).double(), (x,), [(x,), (odd,)]).folded == 1


class Base(Net):
    def forward(self, x):
        y = self.conv(x)
        try: return self.bn(y)
        except ValueError: return y
def unbatched(f):
    @functools.wraps(f)
    def forward(self, x):
        try: return f(self, x)
        except ValueError: return self.conv(x)
    return forward


@pytest.mark.parametrize('forward', [lambda m, x: Base.forward(m, x)*2, lambda m, x: super(type(m), m).forward(x)*2, unbatched(lambda m, x: m.bn(m.conv(x)))], ids=['named', 'super', 'decorated'])
def test_code_of_bases_and_decorators(forward):
    for example in ((), (x,)): folded(net(forward, Base, conv=conv(), bn=bn()), example, [(x,), (x[0],)])


def test_a_choice_reads():
    for forward in (lambda m, x: m.bn(y) if (y := m.conv(x)).any() else y, lambda m, x: m.bn(y) if torch.allclose(y := m.conv(x), x) else m.bn(y)*2):
        for example in ((), (x,)): folded(pair(forward), example, [(x,), (x*0,)])


class Memory(Net):
    def __init__(self, **layers): super().__init__(**layers); self.seen, self.last = collections.deque(maxlen=3), collections.defaultdict(list)
shared, counted = [], {}
def remembers(m, x):
    y = m.bn(m.conv(x))
    m.seen.append(y)
    m.last['y'].append(y)
    shared.append(y)
    counted['n'] = y
    return y


@pytest.mark.parametrize('example', [(), (x,)], ids=['without', 'example'])
def test_a_trace_leaves_nothing_behind(example):
    model = net(remembers, Memory, conv=conv(), bn=bn())
    BN_Folder().fold(model, *example)
    assert not model.seen and not model.last and shared == [] and counted == {}


class Cached(Net):
    @functools.lru_cache
    def scale(self): return self.bn.weight.abs().mean()


def test_a_method_that_is_cached():
    model = net(lambda m, x: m.bn(m.conv(x))*m.scale(), Cached, conv=conv(), bn=bn())
    why = BN_Folder().plan(model)['bn'].why
    assert 'it keeps what it computed' in why and isinstance(run(model, (x,), {}), torch.Tensor)


def test_a_compiled_module_is_not_copied():
    model = pair(lambda m, x: m.bn(m.conv(x)))
    model._compiled_call_impl = lambda x: x # as `model.compile()` makes it, for what it was called on
    assert BN_Folder().fold(model)._compiled_call_impl is None


class Frozen(nn.Module):
    "As DETR has it: its ε is in its code"
    def __init__(self, n=4):
        super().__init__()
        for name, t in dict(weight=torch.randn(n), bias=torch.randn(n), running_mean=torch.randn(n), running_var=torch.rand(n)/100).items(): self.register_buffer(name, t)
    def forward(self, x):
        w, b, v, m = (t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_var, self.running_mean))
        epsilon = 1e-5
        scale = w*(v + epsilon).rsqrt()
        return x*scale + (b - m*scale)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_an_epsilon_in_the_code(dtype):
    model, folder = nn.Sequential(conv(), Frozen()).eval().to(dtype), BN_Folder()
    new = folder.fold(model, x.to(dtype))
    assert folder.report.folded == 1
    same(model.double(), new.double(), [(x,)]) if dtype == torch.float64 else None
    assert difference(run(model.double(), (x,), {}), run(new.double(), (x,), {})).relative < 1e-6


class Remade(nn.Module):
    "Made anew by a copy, and in training mode, as the layers of einops are"
    def forward(self, x): return x
    def __getstate__(self): return {}
    def __setstate__(self, state): self.__init__()


def test_a_copy_that_is_made_anew():
    new = BN_Folder().fold(randomise(nn.Sequential(conv(), bn(), Remade()).eval()))
    assert not norms(new) and not any(m.training for m in new.modules())


def scaled_forward(self, x): return F.linear(x, self.weight, self.bias).relu()


def test_layers_that_are_not_pytorchs_any_more(monkeypatch):
    model = pair(lambda m, x: m.bn(m.conv(x)))
    model.conv._conv_forward = lambda x, weight, bias: F.conv2d(x, weight - weight.mean(), bias, padding=1)
    for example in ((), (x,)): folded(model, example, [(x,)])
    model = pair(lambda m, x: m.bn(m.conv(x)) + m.conv(input=x))
    for example in ((), (x,)): assert not folded(model, example, [(x,)]).folded
    monkeypatch.setattr(nn.Linear, 'forward', scaled_forward)
    flat = net(lambda m, x: m.bn(m.fc(x)), fc=nn.Linear(4, 4), bn=nn.BatchNorm1d(4))
    for example in ((), (x[..., 0, 0],)): folded(flat, example, [(x[..., 0, 0],)])


numbers = dict(
    zeros=lambda m, x: (y := m.bn(m.conv(x))) + torch.zeros(y.shape[0], 4, 1, 1, dtype=y.dtype),
    root=lambda m, x: (y := m.bn(m.conv(x)).flatten(2)) @ y.transpose(1, 2)/math.sqrt(y.shape[-1]),
    whole=lambda m, x: (y := m.bn(m.conv(x)))[..., :int(y.shape[-1]*.5)],
    smallest=lambda m, x: (y := m.bn(m.conv(x))).clamp(min=torch.finfo(y.dtype).min),
    numpys=lambda m, x: (y := m.bn(m.conv(x)))/np.sqrt(y.shape[-1]),
    is_a_float=lambda m, x: m.bn(y) if isinstance((y := m.conv(x)).shape[0]/2, float) else y,
    is_a_tensor=lambda m, x: m.bn(y) if isinstance(torch.arange((y := m.conv(x)).shape[0]), torch.Tensor) else y,
    is_a_name=lambda m, x: m.bn(y) if not isinstance((y := m.conv(x)).device.type, str) else y,
    in_a_list=lambda m, x: m.bn(y := m.conv(x)) + torch.tensor([y.sum(), 2.]).mean(),
    by_a_size=lambda m, x: m.bn((y := m.conv(x))*torch.arange(y.shape[-1])),
    of_two=lambda m, x: m.bn(y) if int((y := m.conv(x)).shape[0]) == 2 else y)


@pytest.mark.parametrize('name', numbers)
def test_numbers_computed_from_sizes(name):
    for example in ((), (x,)):
        report = folded(pair(numbers[name]), example, [(x,), (odd,), (x[:1],)])
        if name in ('zeros', 'root', 'whole', 'smallest', 'numpys'): assert report.folded == 1


class Stages(nn.Module):
    "Chooses what it returns, and not what its stages do"
    def __init__(self): super().__init__(); self.stages = nn.ModuleList([nn.Sequential(conv(), bn()) for _ in range(2)])
    def forward(self, x, all_of_them=False):
        seen = ()
        for s in self.stages:
            if all_of_them: seen = (*seen, x)
            x = s(x)
        return (x, *seen)
class Library(nn.Module):
    "As the models of transformers are: any keywords, a class of its own for what it gives"
    def __init__(self): super().__init__(); self.encoder = Stages()
    def forward(self, x, all_of_them=None, **kw): return self.encoder(x, all_of_them=all_of_them if all_of_them is not None else False)


class Padded(nn.Module):
    "A convolution that pads what it is given, as its size asks for, and its BatchNorm"
    def __init__(self): super().__init__(); self.conv, self.bn = conv(padding=0, stride=2), bn()
    def forward(self, x):
        pads = [max(3 - 2, 0) if n % 2 == 0 else max(3 - n % 2, 0) for n in (x.shape[3], x.shape[2])]
        x = F.pad(x, (pads[0]//2, pads[0] - pads[0]//2, pads[1]//2, pads[1] - pads[1]//2))
        return self.bn(self.conv(x))


def test_a_child_that_was_followed_in_a_parent_that_was_not():
    class Any(nn.Module):
        def __init__(self): super().__init__(); self.stem = Padded()
        def forward(self, x, **kw): return self.stem(x, **kw).relu()
    class Reaches(Any):
        def forward(self, x, **kw): return self.stem(x, **kw) if x.mean() < 0 else self.stem.conv(x)
    assert folded(randomise(Any()), (x,), [(x,), (odd,)]).folded == 1
    assert not folded(randomise(Reaches()), (x,), [(x,), (-x,), (odd,)]).folded


def test_what_a_parent_chooses_is_not_what_its_children_do():
    for counts in (None, iter(())): # which nobody follows
        model = randomise(Library())
        model.counts = counts
        assert folded(model, (x,), [(x,), (odd,), (x, True)]).folded == 2


class Child(Net): pass
def small(x): return x.shape[-1] < 9
def halved(m, x): return x*.5 if small(x) else m.bn(x)
def leaky(m, x): return F.leaky_relu(x) if small(x) else m.bn(x)
def left_alone(m, x): return x if small(x) else m.bn(x)
def by_two(m, x): return m.bn(x) if small(x) else m.other(x)
def in_a_tuple(m, x): return (x*2, x) if small(x) else (m.bn(x), x)
def through_an_activation(m, x): return F.silu(x) if small(x) else m.act(m.bn(x))
def scaled_by_norms(m, x): return x*.5 if small(x) else m.norm(x)
def by_a_layer(m, x): return x*.5 if small(x) else m.layer(x)
ways_out = {f.__name__: f for f in (halved, leaky, left_alone, by_two, in_a_tuple, through_an_activation, scaled_by_norms, by_a_layer)}

@pytest.mark.parametrize('switches', [{}, dict(through_relu=True, scales=True, series=True, reparameterize=True)], ids=['plain', 'all'])
@pytest.mark.parametrize('name', ways_out)
def test_a_layer_behind_one_of_several_ways(name, switches):
    "What comes by another way has nothing of the BatchNorm"
    def forward(m, x):
        y = m.child(F.gelu(m.conv(x)))
        return m.end(y[0] if isinstance(y, tuple) else y)
    child = net(ways_out[name], Child, bn=bn(), other=bn(), act=nn.ReLU(), norm=nn.GroupNorm(2, 4), layer=nn.Conv2d(4, 4, 1))
    large = torch.randn(2, 4, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for example in ((), (x,), (large,)):
        folder = BN_Folder(**switches)
        same(model := net(forward, conv=conv(), child=child, end=nn.Conv2d(4, 3, 1)), folder.fold(model, *example), [(x,), (odd,), (large,)])
        assert {'child.bn', 'child.other'} <= {r.name for r in folder.report if not r.folded}
        if name == 'halved': assert 'chooses its way' in folder.report['child.bn'].why

def test_a_layer_before_several_ways_takes_it_in_where_all_are_it():
    "against the current a BatchNorm behind them goes into every one"
    def forward(m, x): return m.bn(m.conv(x) if small(x) else m.conv2(x))
    model = net(forward, conv=conv(), conv2=conv(), bn=bn())
    for example in ((), (x,), (odd,)): assert folded(model, example, [(x,), (odd,)]).folded == 1


def last_of_two(m, x):
    y = m.norm(m.conv(x)).chunk(2, 1)
    return m.a(y[0]) + m.b(y[-1])
def last_of_a_list(m, x):
    y = m.norm(m.conv(x)).split([2, 2], dim=1)
    return m.a(y[0]) + m.b(y[-1])
def last_but_one(m, x):
    y = m.norm(m.conv(x)).chunk(2, 1)
    return m.a(torch.tanh(y[-2])) + m.b(y[-1])
def all_but_the_first(m, x):
    y = m.norm(m.conv(x)).split(1, 1)
    return m.a(torch.cat(y[:2], 1)) + m.b(torch.cat(y[2:], 1))
def by_one_name(m, x):
    y = m.conv(x).chunk(2, 1)
    return m.a(y[0]) + m.b(y[-1])
from_the_end = {f.__name__: f for f in (last_of_two, last_of_a_list, last_but_one, all_but_the_first, by_one_name)}

@pytest.mark.parametrize('norm', [bn, lambda: nn.GroupNorm(2, 4)], ids=['batch', 'group'])
@pytest.mark.parametrize('name', from_the_end)
def test_parts_that_are_counted_from_the_end(name, norm):
    for example in ((), (x,)):
        for switches in ({}, dict(scales=True), dict(reparameterize=True), dict(series=True)):
            model = net(from_the_end[name], conv=conv(), norm=norm(), a=nn.Conv2d(2, 2, 1), b=nn.Conv2d(2, 2, 3, padding=1))
            same(model, BN_Folder(**switches).fold(model, *example), [(x,), (odd,)])


def test_the_chunks_of_a_signal_are_not_of_its_channels():
    "A Linear's are on the last axis: of the others there may be fewer than are asked for"
    def forward(m, x):
        parts = [p.mean(1) for p in m.fc(x).chunk(4, 1)]
        y = m.conv(x.transpose(1, 2))
        return (y if len(parts) < 4 else m.bn(y)).mean(2) + sum(parts)
    signals = [torch.randn(2, n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (8, 5, 3)]
    for example in ((), signals[:1]): folded(net(forward, fc=nn.Linear(4, 4), conv=nn.Conv1d(4, 4, 1), bn=nn.BatchNorm1d(4)), example, [(s,) for s in signals])


Out = collections.namedtuple('Out', 'y more')
def test_ways_that_give_a_named_tuple():
    def forward(m, x):
        y = m.bn(m.conv(x))
        return Out(y.relu(), y) if x.sum() > 0 else Out(y, y*2)
    assert folded(pair(forward), (), [(x,), (-x,)]).folded == 1


vectors, targets = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
def losses(m, x, y=None):
    h = m.out(m.bn(m.fc(x)).relu())
    return h if y is None else (h, nn.functional.cross_entropy(h, y))
def embeds(m, x, embed=False):
    h = m.bn(m.fc(x)).relu()
    return h if embed else m.out(h)
def checks(m, x):
    h = m.fc(x)
    return m.out(torch.zeros_like(h) if torch.isnan(h).any() else m.bn(h))
def by_the_batch(m, x): return m.out(m.bn(m.fc(x)) if len(x) > 1 else m.fc(x))
def activated_for_one(m, x):
    h = m.fc(x)
    return m.out(m.bn(h if len(x) > 1 else h.relu()))

@pytest.mark.parametrize('forward, calls, folds', [(losses, [(vectors,), (vectors, targets)], True), (embeds, [(vectors,), (vectors, True)], True), (by_the_batch, [(vectors,), (vectors[:1],)], False), (activated_for_one, [(vectors,), (vectors[:1],)], True)]) # into what comes after it
def test_a_branch_beside_a_linear(forward, calls, folds):
    "an example tells how many axes its input has; the branch must allow the fold all the same"
    model = net(forward, fc=nn.Linear(4, 6), bn=nn.BatchNorm1d(6), out=nn.Linear(6, 3))
    assert folded(model, calls[0], calls).folded == folds
    assert not folded(model, (), calls).folded


def test_a_hook_that_gives_another_number_of_axes():
    "is not what the example is"
    model = net(embeds, fc=nn.Linear(4, 6), bn=nn.BatchNorm1d(6), out=nn.Linear(6, 3))
    model.register_forward_pre_hook(lambda m, args: (args[0].reshape(-1, 4), *args[1:]))
    assert BN_Folder().plan(model, vectors).folded == 0
