"What a `forward` may go by besides its input: chance, how it is run, who calls it, and at what size."
import functools, os, random, threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import is_grad_enabled as trained, nn
from torch.nn.functional import avg_pool2d
from torch.utils.dlpack import from_dlpack, to_dlpack

from fasterai.fold.verify import difference, run
from fasterai.misc.bn_folding import BN_Folder, FoldError, _Fold
from helpers import fold, net, randomise
from test_ways import bn, conv, folded, odd, pair, same, x


def seeded(seed):
    for seed_it in (random.seed, np.random.seed, torch.manual_seed): seed_it(seed)
generator, ours = np.random.default_rng(0), random.Random(0)
by_chance = dict(
    numpy=lambda m, x: m.bn(m.conv(x)) if np.random.rand() < .5 else m.conv(x),
    python=lambda m, x: m.bn(m.conv(x)) if random.random() < .5 else m.conv(x),
    a_list=lambda m, x: m.bn(m.conv(x)) if random.choice([True, False]) else m.conv(x),
    torch=lambda m, x: m.bn(m.conv(x)) if torch.rand(1).item() < .5 else m.conv(x),
    filled=lambda m, x: m.bn(m.conv(x)) if float(torch.empty(1).uniform_()) < .5 else m.conv(x),
    a_generator=lambda m, x: m.bn(m.conv(x)) if generator.random() < .5 else m.conv(x),
    another=lambda m, x: m.bn(m.conv(x)) if ours.random() < .5 else m.conv(x),
    its_own=lambda m, x: m.bn(m.conv(x)) if m.generator.random() < .5 else m.conv(x))


@pytest.mark.parametrize('name', by_chance)
def test_chance_that_chooses(name):
    for example in ((), (x,)):
        model = pair(by_chance[name])
        model.generator = random.Random(0)
        report = BN_Folder().plan(model, *example)
        assert not report.folded and (example or 'draws random numbers' in report['bn'].why)


def test_chance_in_a_child_is_its_own():
    "and what runs in training alone is nobody's"
    def dropped(m, x): return x*2 if m.training and random.random() < .5 else x
    def chosen(m, x): return x if random.random() < .5 else -x
    model = net(lambda m, x: m.choose(m.drop(m.bn(m.conv(x)))), conv=conv(), bn=bn(), drop=net(dropped), choose=net(chosen))
    report = folded(model, (), [])
    assert report.folded == 1
    seeded(0)
    want = model(x)
    seeded(0)
    assert difference(want, BN_Folder().fold(model)(x)).relative < 1e-12


def recurrent(m, x):
    y = m.conv(x)
    out = m.bn(y) if m.state is None else y - m.state
    m.state = out.detach()
    return out
def lazily(m, x):
    if m.state is None:
        m.state = True
        return m.bn(m.conv(x))
    return m.conv(x)
def counts(m, x):
    m.state = (m.state or 0) + 1
    return m.bn(m.conv(x)) if m.state < 5 else m.conv(x)
def grows(m, x):
    m.seen.append(1)
    return m.bn(m.conv(x)) if len(m.seen) < 5 else m.conv(x)
calls = 0
def counts_globally(m, x):
    global calls
    calls += 1
    return m.bn(m.conv(x)) if calls % 2 else m.conv(x)
def another_part(m, x):
    y = m.wide(x)[:, :4] if m.state is None else m.wide(x)[:, 4:]
    m.state = True
    return m.bn(y)
def takes_turns(m, x):
    m.conv, m.other = m.other, m.conv
    return m.bn(m.conv(x))


@pytest.mark.parametrize('forward', [recurrent, lazily, counts, grows, another_part, takes_turns])
def test_what_it_remembers_of_one_call_may_decide_another(forward):
    for example in ((), (x,)):
        model, folder = pair(forward, other=conv(), wide=conv(8)), BN_Folder()
        model.state, model.seen = None, []
        new = folder.fold(model, *example)
        assert (model.state, model.seen, new.state, new.seen) == (None, [], None, [])
        same(model, new, [(x,)]*7) # each remembers
        assert folder.report.folded == (forward is takes_turns), folder.report # both convolutions can take it in


def test_what_it_keeps_outside():
    assert BN_Folder().plan(pair(counts_globally))['bn'].why.endswith('it keeps what it computed')


def test_memory_that_changes_nothing():
    def keeps(m, x):
        m.size, m.last = x.shape, (y := m.bn(m.conv(x))).detach()
        return y.relu()
    def caches(m, x):
        y = m.bn(m.conv(x))
        if m.last is None or m.last.shape != y.shape: m.last = torch.ones_like(y)
        return y.relu() + m.last
    def of_its_parent(m, x): return m.bn(m.conv(x)).flatten(2).relu().view(x.shape[0], 4, m.height, m.width)
    def sets(m, x):
        m.child.height, m.child.width = x.shape[2], x.shape[3]
        return m.child(x)
    for forward in (keeps, caches, sets):
        for example in ((), (x,)):
            model = net(forward, child=pair(of_its_parent)) if forward is sets else pair(forward)
            model.last = model.size = None
            assert folded(model, example, [(x,), (odd,)]).folded == 1


def by_the_mode(x): return x.relu() if torch.is_grad_enabled() else x
def alone(x): return x.relu() if torch.is_inference_mode_enabled() else x
def in_autocast(x): return x.relu() if torch.is_autocast_enabled() else x
def by_name(x): return x.relu() if trained() else x
def traced(x): return x.relu() if torch.jit.is_tracing() else x
def compiled(x): return x.relu() if torch.compiler.is_compiling() else x
def exported(x): return x.relu() if torch.onnx.is_in_onnx_export() else x


@pytest.mark.parametrize('asks', [by_the_mode, by_name, alone, in_autocast, traced, compiled, exported])
def test_both_answers_of_how_it_is_run_are_heard(asks):
    for example in ((), (x,)):
        assert not folded(net(lambda m, x: m.bn(asks(m.conv(x))), conv=conv(), bn=bn()), example, [(x,)]).folded # a ReLU between, in one of them
        assert folded(net(lambda m, x: asks(m.bn(m.conv(x))), conv=conv(), bn=bn()), example, [(x,)]).folded == 1 # behind, whatever the answer


outside = [conv().double()]
def by_strides(m, x): return torch.cond(x.is_contiguous(), m.bn, lambda y: y.clone(), (m.conv(outside[0](x.double())),))
def by_the_name_of_its_dtype(m, x): return m.get_submodule('norm_' + str(x.dtype).split('.')[1])(m.conv(outside[0](x.double())))
def by_the_largest(m, x): return max((x.is_contiguous(), 0, m.bn), (not x.is_contiguous(), 1, nn.Identity()))[2](m.conv(outside[0](x.double())))
def by_what_counts(m, x): return m.bn(F.avg_pool2d(m.conv(outside[0](x.double())), 3, 1, 1, count_include_pad=not x.is_floating_point()))
def by_its_gradient(m, x): return m.bn(F.dropout(m.conv(outside[0](x.double())), .5, x.requires_grad))
def by_any_gradient(m, x): return m.bn(F.dropout(m.conv(outside[0](x.double())), .5, torch.is_grad_enabled()))
def normed(bn, y, x):
    if type(x) is torch.Tensor and x.dtype == torch.float64: return bn(y)
    return y
def by_its_child(m, x): return m.bn(F.dropout(m.conv(outside[0](x.double())), .5, m.asks(x)))
def by_kind_and_dtype(m, x): return normed(m.bn, m.conv(x.double()), x)

@pytest.mark.parametrize('forward', [by_strides, by_the_name_of_its_dtype, by_the_largest, by_what_counts, by_its_gradient, by_any_gradient, by_its_child, by_kind_and_dtype])
def test_what_cannot_be_followed_goes_by_what_it_asks(forward):
    model = pair(forward, norm_float64=bn(), norm_float32=nn.Identity(), norm_int64=nn.Identity(), asks=net(lambda m, x: not x.is_floating_point()))
    for example in ((), (x,)):
        folder = BN_Folder()
        new = folder.fold(model, *example)
        assert not folder.report.folded
        for given in (x, x.contiguous(memory_format=torch.channels_last), x.float(), (x*9).long(), x.clone().requires_grad_()):
            torch.manual_seed(0)
            want = model(given)
            torch.manual_seed(0)
            assert difference(want, new(given)).relative < 1e-12


pool, grid = ThreadPoolExecutor(1), np.linspace(0, 1, 4)[:, None, None]
def by_a_thread(f, y):
    out = []
    thread = threading.Thread(target=lambda: out.append(f(y)))
    thread.start()
    thread.join()
    return out[0]
def by_writing(m, y):
    out = torch.zeros_like(y)
    pool.submit(lambda: out.add_((y - 5).relu())).result()
    return out
@functools.lru_cache
def ramp(n): return torch.linspace(0, 1, n, dtype=torch.float64)
out_of_sight = dict(
    executor=lambda m, y: pool.submit(lambda: (y - 5).relu()).result(), mapped=lambda m, y: [*pool.map(lambda y: (y - 5).relu(), [y])][0],
    thread=lambda m, y: by_a_thread(lambda y: (y - 5).relu(), y), capsule=lambda m, y: (from_dlpack(to_dlpack(y.detach())) - 5).relu(),
    number=lambda m, y: pool.submit(lambda: float((y - 5).relu().amax())).result(), written=by_writing)
in_sight = dict(numpy=lambda m, y: torch.from_numpy(grid), numbers=lambda m, y: torch.tensor([1., 2, 3, 4]).double()[:, None, None], remembered=lambda m, y: ramp(8), held=lambda m, y: m.seen[0])

@pytest.mark.parametrize('name', [*out_of_sight, *in_sight])
def test_what_a_run_does_not_show(name):
    made = (out_of_sight | in_sight)[name]
    def forward(m, x): return m.bn(y := m.conv(outside[0](x))) + made(m, y)
    ramp(8)
    for example in ((), (x,)):
        model, folder = pair(forward), BN_Folder()
        model.seen = [torch.ones(4, 1, 1, dtype=torch.float64)]
        new = folder.fold(model, *example)
        same(model, new, [(x,), (-x*20,)])
        if example: assert folder.report.folded == (name in in_sight), folder.report


def to_its_dtype(m, x): return m.bn(m.conv(x.double()).to(x.dtype).double())
def to_another(m, x): return m.bn(m.conv(x.double()).type_as(x).double())
def to_a_named_dtype(m, x): return m.bn(m.conv(x.double()).to(dtype=x.dtype).double())
def dropped_by_an_argument(m, x, on): return m.bn(F.dropout(m.conv(x.double()), .5, on))
def dropped_with_a_gradient(m, x): return m.bn(F.dropout(m.conv(x.double()), .5, training=x.requires_grad))

@pytest.mark.parametrize('forward', [to_its_dtype, to_another, to_a_named_dtype, dropped_by_an_argument, dropped_with_a_gradient])
def test_an_operation_that_does_nothing_on_the_example(forward):
    more = lambda *on: on if forward is dropped_by_an_argument else ()
    for example in ((), (x, *more(False))):
        model, folder = pair(forward), BN_Folder()
        new = folder.fold(model, *example)
        for given in ((x, *more(False)), (x, *more(True)), ((x*9).long(), *more(False)), (x.clone().requires_grad_(), *more(False))):
            torch.manual_seed(0)
            want = model(*given)
            torch.manual_seed(0)
            assert difference(want, new(*given)).relative < 1e-12, folder.report


def test_what_is_no_number_may_be_handed_on():
    def added(m, x, y, on): return m.bn(m.conv(x)).relu() + y
    assert folded(pair(lambda m, x: m.bn(m.conv(x.to(torch.float64).to(x.device)))), (x,), [(x,)]).folded == 1
    assert folded(pair(added), (x, x, True), [(x, x, True), (odd, odd, False)]).folded == 1


def test_the_modes_themselves():
    model = net(lambda m, x: m.bn(by_the_mode(m.conv(x))), conv=conv(), bn=bn())
    with torch.enable_grad(): want = model(x)
    new = BN_Folder().fold(model, x)
    with torch.enable_grad(): assert difference(want, new(x)).relative < 1e-12
    answers, tell = os.pipe() # nothing that Python holds
    def waits(m, x):
        other = threading.Thread(target=lambda: os.write(tell, b'yes' if torch.is_grad_enabled() else b'no'))
        other.start()
        other.join()
        return m.bn(m.conv(x))
    before = torch.is_grad_enabled
    assert folded(pair(waits), (), []).folded == 1
    assert os.read(answers, 3) == b'yes' and torch.is_grad_enabled is before is trained # another thread hears the truth


def test_where_nothing_can_answer_both_ways():
    def by_default(m, x, on=trained): return m.bn(m.conv(x).relu() if on() else m.conv(x))
    in_a_closure = lambda on: lambda m, x: m.bn(m.conv(x).relu() if on() else m.conv(x))
    for forward in (in_a_closure(trained), lambda m, x: m.bn(m.conv(x).relu() if m.on() else m.conv(x)), lambda m, x: by_default(m, x)):
        model = pair(forward)
        model.on = trained
        report = BN_Folder().plan(model)
        assert report['bn'].why.endswith('it asks `is_grad_enabled`')


class Swallows:
    def __enter__(self): return self
    def __exit__(self, *error): return error[0] is ValueError
class Passes(Swallows):
    def __exit__(self, *error): self.seen = error
swallows = Swallows()
def of_its_own(m, x):
    y = m.conv(x)
    with Swallows(): y = m.bn(y)
    return y
def of_a_global(m, x):
    y = m.conv(x)
    with swallows: y = m.bn(y)
    return y
def of_an_attribute(m, x):
    y = m.conv(x)
    with m.guard: y = m.bn(y)
    return y


@pytest.mark.parametrize('forward', [of_its_own, of_a_global, of_an_attribute])
def test_a_context_that_swallows_what_a_batchnorm_raises(forward):
    single = x[0] # a convolution takes it, a BatchNorm2d does not
    for example in ((), (x,)):
        model = pair(forward)
        model.guard = Swallows()
        assert not folded(model, example, [(x,), (single,)]).folded
    def passing(m, x):
        with Passes(): return m.bn(m.conv(x))
    assert folded(pair(passing), (), [(x,)]).folded == 1


class Helped(nn.Module):
    "A child whose other methods are called"
    def __init__(self): super().__init__(); self.conv, self.bn = conv(), bn()
    def run(self, x): return self.bn(self.conv(x)) if x is not None and type(x) is torch.Tensor else x
    def __call__(self, x):
        try: return super().__call__(x)
        except ValueError: return self.conv(x)
    def forward(self, x): return self.bn(self.conv(x))


def test_what_other_methods_of_a_child_ask():
    for forward in (lambda m, x: m.child.run(x), lambda m, x: m.child(x), lambda m, x: m.children_[0].run(x)):
        model = net(forward, child=Helped(), children_=nn.ModuleList([Helped()]))
        assert not folded(model, (), [(x,), (x[0],)] if forward.__code__.co_names[-1] == 'child' else [(x,)]).folded


def test_a_root_that_is_called_in_a_way_of_its_own():
    class Encoder(nn.Module):
        def __init__(self): super().__init__(); self.layers = nn.Sequential(conv(), bn())
        def encode(self, x): return self.layers(x)
        def features(self, x): return self.layers[0](x)
    class Plus(nn.Module):
        def __init__(self): super().__init__(); self.conv, self.bn = conv(), bn()
        def __call__(self, x): return super().__call__(x) + self.conv(x)
        def forward(self, x): return self.bn(self.conv(x))
    model = randomise(Encoder())
    new, want = BN_Folder().fold(model), model.features(x)
    assert difference(want, new.features(x)).relative < 1e-12
    for example in ((), (x,)): assert not folded(randomise(Plus()), example, [(x,)]).folded
    models = randomise(nn.ModuleDict(dict(encoder=nn.Sequential(conv(), bn()), head=nn.Sequential(conv(), bn())))) # each is called by itself
    assert BN_Folder().plan(models).folded == 2


lib = torch.library.Library('fasterai_tests', 'DEF')
lib.define('conv2d(Tensor x, Tensor w, Tensor b) -> Tensor')
lib.impl('conv2d', lambda x, w, b: F.relu(F.conv2d(x, w, b)), 'CompositeExplicitAutograd')
lib.define('double(Tensor(a!) x) -> ()')
lib.impl('double', lambda x: (x.mul_(2), None)[1], 'CompositeExplicitAutograd')
ops = torch.ops.fasterai_tests


def test_operations_of_other_libraries():
    def relus(m, x): return m.bn(ops.conv2d(x, m.conv.weight, m.conv.bias))
    def doubles(m, x):
        z = x*1
        y = m.bn(z)
        ops.double(z)
        return m.conv(y)
    for forward in (relus, doubles):
        for example in ((), (x,)): assert not folded(net(forward, conv=nn.Conv2d(4, 4, 1), bn=bn()), example, [(x,)]).folded


def reads(view): return net(lambda m, x: m.fc(view(m.bn(m.conv(x).relu()))), conv=conv(), bn=bn(), fc=nn.Linear(4, 5))
sizes = dict(
    rows=(lambda y: F.avg_pool2d(y, 8).view(-1, 4), False),
    reshaped=(lambda y: F.avg_pool2d(y, 8).reshape(-1, 4), False),
    split=(lambda y: y.view(-1, 4, 64).mean(2), False),
    one_place=(lambda y: F.adaptive_avg_pool2d(y, 1).view(-1, 4), True),
    averages=(lambda y: y.mean((2, 3)).view(-1, 4), True),
    first_places=(lambda y: F.avg_pool2d(y, 4).view(y.shape[0], -1)[:, :4], False),
    first_images=(lambda y: y.mean((2, 3)).view(y.shape[0], -1)[:, :4], True),
    its_own=(lambda y: y.view(-1, y.shape[1], y.shape[2]*y.shape[3]).mean(2), True),
    again=(lambda y: F.avg_pool2d(y, 8).flatten(1).view(-1, 4), False),
    nothing_cut=(lambda y: F.avg_pool2d(y, 8).flatten(1)[:, :4], False),
    nothing_narrowed=(lambda y: F.avg_pool2d(y, 8).flatten(1).narrow(1, 0, 4), False),
    back=(lambda y: F.avg_pool2d(y, 8).view(y.shape[0], -1).unflatten(1, (-1, 4)).flatten(0, 1), False),
    all_of_it=(lambda y: y.mean((2, 3))[:, :][:, 0:], True),
    channels=(lambda y: y.mean((2, 3))[:, :4].view(y.shape[0], 4), True),
    like_another=(lambda y: F.avg_pool2d(y, 8).view_as(y.new_ones(F.avg_pool2d(y, 8).numel()//4, 4)), False),
    computed_rows=(lambda y: F.avg_pool2d(y, 8).view(-1, y.size(1)), False),
    places_first=(lambda y: (z := F.avg_pool2d(y, 8)).view(z.shape[0], z.shape[2]*z.shape[3], z.shape[1]), False),
    channels_and_places=(lambda y: F.avg_pool2d(y, 8).view(y.shape[0], y.shape[1], -1).mean(2), True),
    pooled_by_size=(lambda y: F.adaptive_avg_pool2d(y, (y.shape[2]//8, 1)).view(-1, 4), False),
    pooled_to_none=(lambda y: F.adaptive_avg_pool2d(F.avg_pool2d(y, 8), (None, 1)).view(-1, 4), False),
    pooled_by_large_size=(lambda y: F.adaptive_avg_pool2d(y, (y.shape[2]//1000 + 1, 1)).view(y.shape[0], -1)[:, :4], False),
    resized_to_large_size=(lambda y: F.interpolate(F.adaptive_avg_pool2d(y, 1), size=(y.shape[2]//1000 + 1, 1)).view(y.shape[0], -1)[:, :4], False),
    numpy_cut=(lambda y: F.avg_pool2d(y, 8).flatten(1)[:, :np.int64(4)], False),
    in_numbers=(lambda y: F.avg_pool2d(y.view(-1, 4, 8, 8), 8).reshape(-1, 4), False))


@pytest.mark.parametrize('name', sizes)
def test_a_view_with_room_for_more(name):
    "at another size it may mix channels and places, or the images of a batch"
    view, folds = sizes[name]
    larger = torch.randn(2, 4, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    report = folded(reads(view), (x,), [(x,), (larger,)])
    assert report.folded == folds and (folds or 'room for more' in report['bn'].why or 'another size' in report['bn'].why)


flags = dict(
    part=lambda m, x, on=False: m.bn(m.wide(x)[:, 4:] if on else m.wide(x)[:, :4]),
    dropout=lambda m, x, on=False: m.bn(F.dropout(m.conv(x), .5, training=on)),
    pad=lambda m, x, on=False: m.one(F.pad(m.bn(x), (1, 1, 1, 1), mode='reflect' if on else 'constant')),
    pool=lambda m, x, on=False: m.one(F.avg_pool2d(m.bn(x), 3, 1, 1, count_include_pad=on)),
    order=lambda m, x, on=False: m.one(m.bn(x).permute((0, 2, 3, 1) if on else (0, 1, 3, 2))[:, :4, :4, :4]),
    chunk=lambda m, x, on=None: m.bn(m.wide(x).chunk(2, 1)[0 if on is None else 1]))


@pytest.mark.parametrize('name', flags)
def test_a_flag_that_changes_the_arguments_of_an_operation(name):
    calls = [(x,), (x, True), (x, False)]
    for example in ((), (x,)):
        model, folder = pair(flags[name], wide=conv(8), one=nn.Conv2d(4, 4, 1)), BN_Folder()
        new = folder.fold(model, *example)
        for args in calls:
            torch.manual_seed(0)
            want = run(model, args, {})
            torch.manual_seed(0)
            assert difference(want, run(new, args, {})).relative < 1e-12, folder.report


def test_a_view_of_another_dtype():
    "gives a shape with other sizes: once it was looked through for ever"
    folded(pair(lambda m, x: m.bn(x).view(torch.complex128).abs()), (x,), [(x,)])


def test_a_pool_as_large_as_what_it_is_given():
    "for which PyTorch asks a stand-in for numbers"
    for forward in (lambda m, x: F.avg_pool2d(y := m.bn(m.conv(x)), y.shape[2:]), lambda m, x: avg_pool2d(y := m.bn(m.conv(x)), kernel_size=y.size()[2:])):
        assert folded(pair(forward), (), [(x,), (odd,)]).folded == 1


def test_groups_that_are_computed():
    def forward(m, x): return m.bn(F.conv2d(x, m.w, m.b, padding=1, groups=x.shape[1]))
    model = net(forward, bn=bn(), w=nn.Parameter(torch.randn(4, 1, 3, 3)), b=nn.Parameter(torch.randn(4)))
    assert [folded(model, example, [(x,), (odd,)]).folded for example in ((), (x,))] == [0, 1]


def test_a_hook_on_every_module():
    from torch.nn.modules.module import register_module_forward_hook
    def doubles(m, inputs, out): return out*2 if isinstance(m, nn.Conv2d) else None
    handle = register_module_forward_hook(doubles)
    try:
        for example in ((), (x,)): assert 'the hook `' in folded(pair(lambda m, x: m.bn(m.conv(x))), example, [(x,)])['bn'].why
    finally: handle.remove()


def test_folded_where_nothing_is_to_be_trained():
    "What is made in inference mode could not be trained, nor loaded into"
    for inplace in (False, True):
        model = pair(lambda m, x: m.bn(m.conv(x)))
        want = model(x)
        with torch.inference_mode(): new = BN_Folder().fold(model, x, inplace=inplace)
        assert difference(want, new(x)).relative < 1e-12 and new(x).requires_grad
        new.load_state_dict(new.state_dict())


def test_folded_where_another_device_is_the_default():
    for example in ((), (x,)):
        model = pair(lambda m, x: m.bn(m.conv(x)))
        with torch.device('meta'): new = BN_Folder().fold(model, *example)
        assert difference(model(x), new(x)).relative < 1e-12


def test_what_cannot_be_copied_is_named():
    model = pair(lambda m, x: m.bn(m.conv(x)))
    want, model.lock = model(x), threading.Lock()
    with pytest.raises(TypeError, match='the `lock` of a Net .*`inplace=True`'): BN_Folder().fold(model)
    assert difference(want, BN_Folder().fold(model, inplace=True)(x)).relative < 1e-12


def test_a_packed_sequence():
    def forward(m, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(m.bn(m.conv(x)).transpose(1, 2), lengths, batch_first=True, enforce_sorted=False)
        return m.rnn(packed)[0].data
    model = net(forward, conv=nn.Conv1d(4, 4, 1), bn=nn.BatchNorm1d(4), rnn=nn.LSTM(4, 4, batch_first=True))
    folded(model, (x[:, :, 0], torch.tensor([8, 5])), [(x[:, :, 0], torch.tensor([8, 5]))])


def test_a_row_that_is_not_there():
    with pytest.raises(KeyError, match="no BatchNorm called 'bn1': bn"): BN_Folder().plan(pair(lambda m, x: m.bn(m.conv(x))))['bn1']


def exists(o): return o is not None
def tried(layer, x):
    try: return layer(x)
    except ValueError: return x
class Helper:
    @staticmethod
    def tried(layer, x): return tried(layer, x)
class Tries(nn.Module):
    "In each way in which a class can have a function"
    def __init__(self, way): super().__init__(); self.conv, self.bn, self.way, self.held, self.part = conv(), bn(), way, [tried], functools.partial(tried)
    @classmethod
    def of_the_class(cls, layer, x): return tried(layer, x)
    @property
    def norm(self):
        def run(x): return tried(self.bn, x)
        return run


ways = dict(
    of_the_class=lambda m, x: m.of_the_class(m.bn, m.conv(x)), norm=lambda m, x: m.norm(m.conv(x)), held=lambda m, x: m.held[0](m.bn, m.conv(x)),
    part=lambda m, x: m.part(m.bn, m.conv(x)), static=lambda m, x: Helper.tried(m.bn, m.conv(x)))


@pytest.mark.parametrize('way', ways)
def test_functions_that_are_no_plain_methods(way):
    model = randomise(type('Net', (Tries,), dict(forward=ways[way]))(way))
    for example in ((), (x,)): assert not folded(model, example, [(x,), (x[0],)]).folded


def test_a_helper_that_asks_for_none():
    def forward(m, x, skip): return m.bn(m.conv(x)) + skip if exists(skip) else m.conv(x)
    for example in ((), (x, x)): assert not folded(pair(forward), example, [(x, x), (x, None)]).folded


def test_in_place_as_a_number():
    def forward(m, x): return m.act(y := m.conv(x)) + m.bn(y)
    for example in ((), (x,)): folded(pair(forward, act=nn.ReLU(inplace=1)), example, [(x,)])


def test_a_compiled_child():
    model = pair(lambda m, x: m.inner(m.bn(m.conv(x))), inner=torch.compile(nn.Sequential(conv(), bn()).double(), backend='eager'))
    want = model(x)
    new = BN_Folder().fold(model)
    assert difference(want, new(x)).relative < 1e-12 and new.inner._orig_mod is not model.inner._orig_mod


class Reads(nn.Module):
    "A parent that can't be followed, and reads a child by a name that it is given"
    def __init__(self, read): super().__init__(); self.a, self.b, self.bn, self.read = conv(), conv(), bn(), read
    def forward(self, x, **kw): return self.bn(self.a(x)) + self.one(x, **kw)


@pytest.mark.parametrize('one', [lambda m, x, name='b': getattr(m, name)(x), lambda m, x, name='b': m._modules.get(name)(x), lambda m, x, name='b': m.get_submodule(name)(x)])
def test_a_child_by_a_name_that_is_given(one):
    model = randomise(type('Net', (Reads,), dict(one=one))(None))
    for example in ((), (x,)):
        folder = BN_Folder()
        new = folder.fold(model, *example)
        for kw in ({}, dict(name='a')): assert difference(run(model, (x,), kw), run(new, (x,), kw)).relative < 1e-12


def test_a_sort_excuses_only_what_comes_of_it():
    def both(m, x):
        y = m.conv(x)
        return (z := m.bn(y) + y.relu()), z.flatten(1).argsort(1)
    class Wrong(_Fold):
        def plan(self): return _Fold(pair(lambda m, x: m.bn(m.conv(x))), (x,), {}).plan()
    for forward in (both, lambda m, x: both(m, x)[::-1]):
        with pytest.raises(FoldError, match='This is a bug of the folder'): Wrong(pair(forward), (x,), {}).run(False)
    assert Wrong(pair(lambda m, x: both(m, x)[1]), (x,), {}).run(False)[0] # it may be all that the numbers are nearly equal
