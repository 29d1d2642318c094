"Any state that a real model is in: folded right, or kept with a reason, or refused with an error that says what to do. Each beside its twin."
import copy, gc, itertools, pickle, random, threading, time, weakref

import numpy as np, pytest, torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel
from torchvision.models import resnet18

from fasterai.fold import apply, layers
from fasterai.fold.bake import computing
from fasterai.fold.held import young_garbage
from fasterai.fold.verify import compare, difference, run
from fasterai.misc import bn_folding
from fasterai.misc.bn_folding import BN_Folder, FoldError
from helpers import assert_untouched, fold, net, norms, randomise, snapshot

x = torch.randn(3, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
def conv(i=4, o=4, k=3, **kw): return nn.Conv2d(i, o, k, **{'padding': k//2, **kw})
def chain(**kw):
    torch.manual_seed(0)
    return randomise(nn.Sequential(conv(bias=False, **kw), nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.BatchNorm2d(4)))
examples = pytest.mark.parametrize('example', [False, True], ids=['symbolic', 'example'])


# Modes that change in a `forward`

def a_batch_by_itself(m, x):
    if len(x) == 1: return m.bn(m.conv(x))
    m.bn.train()
    y = m.bn(m.conv(x))
    m.bn.eval()
    return y
def both_in_one(m, x):
    a = m.bn(m.conv(x))
    m.bn.train()
    b = m.bn(m.conv(x))
    m.bn.eval()
    return a, b
def all_in_training(m, x):
    a = m.bn(m.conv(x))
    for o in m.modules():
        if isinstance(o, nn.BatchNorm2d): o.train()
    b = m.bn(m.conv(x))
    m.eval()
    return a + b
def from_the_next_call_on(m, x):
    y = m.bn(m.conv(x))
    m.bn.training = True
    return y
def every_other_call(m, x):
    y = m.bn(m.conv(x))
    m.bn.train(not m.bn.training)
    return y

@examples
@pytest.mark.parametrize('forward', [a_batch_by_itself, both_in_one, all_in_training, from_the_next_call_on, every_other_call])
def test_a_batchnorm_that_takes_batch_statistics_in_some_call(forward, example):
    model = net(forward, conv=conv(), bn=nn.BatchNorm2d(4))
    new = BN_Folder().fold(model, *[x]*example)
    for given in (x[:1], x, x): assert difference(run(model, (given,), {}), run(new, (given,), {})).relative < 1e-12
    assert norms(new)


# Precision

def error(model, truth, x): return difference(truth, run(model, (x,), {})).relative

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_no_less_precise(dtype):
    "The folded network is as near to the float64 truth as the unfolded one (over several inputs and networks: one alone is chance)"
    was = now = 0.
    for seed in range(6):
        torch.manual_seed(seed)
        model = randomise(nn.Sequential(*[l for _ in range(4) for l in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]), seed).to(dtype)
        x = torch.randn(4, 8, 12, 12).to(dtype)
        truth = run(copy.deepcopy(model).double(), (x.double(),), {})
        was += error(model, truth, x)
        now += error(BN_Folder().fold(model), truth, x)
    assert now <= 1.2*was

def test_half_layer_with_float32_batchnorm():
    model = chain().half()
    for i in (1, 4): model[i].float()
    new = BN_Folder().fold(model)
    assert {p.dtype for p in new.parameters()} == {torch.float16} and new[0].bias.dtype == torch.float16
    assert torch.equal(new[0].weight, BN_Folder().fold(copy.deepcopy(model).double())[0].weight.half()) # rounded once

@pytest.mark.parametrize('var, gamma', [(0., 1.), (1e-30, 1e-20), (1e30, 1.), (1., 0.), (1e-12, 1e8)])
def test_extreme_statistics(var, gamma):
    model = chain().float()
    with torch.no_grad(): model[1].running_var.fill_(var); model[1].weight.fill_(gamma)
    want, new = model(x.float()), BN_Folder().fold(model)
    assert torch.equal(new(x.float()).isfinite(), want.isfinite())
    assert difference(want, new(x.float())).relative < 1e-5 or not want.isfinite().all()

def test_overflow_is_kept_and_a_smaller_scale_folds():
    for gamma, folded in ((6e4, False), (1e2, True)):
        model, bn = chain().half(), BN_Folder()
        with torch.no_grad(): model[1].weight.fill_(gamma); model[0].weight.fill_(100.)
        new = bn.fold(model)
        assert bn.report['1'].folded == folded and all(p.isfinite().all() for p in new.parameters())
        assert ('would not fit its dtype' in bn.report['1'].why) != folded

def test_no_subnormal_weight():
    model = chain().float()
    with torch.no_grad(): model[1].weight.copy_(torch.tensor([1e-38, 1e-37, 1., 0.]))
    new = BN_Folder().fold(model)
    tiny = torch.finfo(torch.float32).tiny
    assert ((new[0].weight == 0) | (new[0].weight.abs() >= tiny)).all()
    raw = model[0].weight.double()*(model[1].weight.double()/(model[1].running_var.double() + 1e-5).sqrt())[:, None, None, None]
    assert ((raw != 0) & (raw.abs() < tiny)).any() # there was something to flush

@examples
def test_complex_is_left_alone(example):
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.lin, self.conv, self.bn = nn.Linear(6, 6, dtype=torch.complex128), conv(), nn.BatchNorm2d(4)
        def forward(self, x): return self.bn(self.conv(self.lin(x.to(torch.complex128)).real))
    model = Net()
    for k, v in model.lin.named_parameters(): v.data = torch.randn(v.shape, dtype=torch.complex128)
    model.conv.double(); model.bn.double()
    new, report = fold(model.eval(), x, example=example)
    assert report['bn'].folded and torch.equal(new.lin.weight, model.lin.weight)

def test_float8_weight_is_kept():
    model = chain()
    model[0].weight.data = model[0].weight.data.to(torch.float8_e4m3fn)
    report = BN_Folder().plan(model)
    assert 'float8' in report['1'].why and report['4'].folded


# Layout and placement

@pytest.mark.parametrize('format', [torch.contiguous_format, torch.channels_last])
def test_memory_format_and_frozen_parts(format):
    model = randomise(resnet18(num_classes=3)).to(memory_format=format)
    for n, p in model.named_parameters(): p.requires_grad_(n.startswith('layer2'))
    new = BN_Folder().fold(model)
    for n, p in new.named_parameters():
        layer = model.get_submodule(n.rpartition('.')[0])
        assert type(p) is nn.Parameter and p.is_leaf and p.requires_grad == layer.weight.requires_grad, n
        if n.endswith('weight'): assert p.stride() == layer.weight.stride(), n
    assert new.state_dict().keys() == {k for k in model.state_dict() if model.get_submodule(k.rpartition('.')[0]).__class__ is not nn.BatchNorm2d} | \
        {f'{r.into}.bias' for r in BN_Folder().plan(model)}

@examples
def test_meta(example):
    new, bn = None, BN_Folder()
    model = chain().to('meta')
    new = bn.fold(model, *([x.to('meta')] if example else []))
    assert bn.report.folded == 2 and all(p.is_meta for p in new.parameters())

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@examples
def test_split_over_devices(example):
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = chain(), chain().cuda()
        def forward(self, x): return self.b(self.a(x).cuda())
    model = Net().eval()
    new, report = fold(model, x, example=example)
    assert report.folded == 4 and new.a[0].bias.device.type == 'cpu' and new.b[0].bias.device.type == 'cuda'

def test_split_over_devices_plans():
    "Half on the meta device, which stands for any other"
    model = nn.Sequential(chain(), chain().to('meta')).eval()
    new = BN_Folder().fold(model)
    assert [new[i][0].bias.device.type for i in (0, 1)] == ['cpu', 'meta']


# Sharing

def tied(same):
    m = net(lambda m, x: m.bn2(m.b(m.bn1(m.a(x)).relu())), a=conv(), b=conv(), bn1=nn.BatchNorm2d(4), bn2=nn.BatchNorm2d(4))
    if same: m.b.weight = m.a.weight
    return m

@examples
def test_tied_weights(example):
    "One parameter of two layers is rewritten for neither; two of the same numbers are for both"
    new, report = fold(tied(True), x, example=example)
    assert report.folded == 0 and new.a.weight is new.b.weight and 'shared with' in report['bn1'].why
    assert fold(tied(False), x, example=example)[1].folded == 2

@examples
def test_views_of_one_memory(example):
    "Two parameters that are two names of the same numbers"
    model = tied(False)
    model.b.weight = nn.Parameter(model.a.weight.detach())
    new, report = fold(model, x, example=example)
    assert report.folded == 0


# Hooks

def spied(kind):
    m = chain()
    hooks = dict(forward=lambda: m[0].register_forward_hook(lambda *a: None), pre=lambda: m[1].register_forward_pre_hook(lambda *a: None),
                 backward=lambda: m[0].register_full_backward_hook(lambda *a: None), backward_pre=lambda: m[1].register_full_backward_pre_hook(lambda *a: None),
                 state_dict=lambda: m[0].register_state_dict_post_hook(lambda *a: None) if hasattr(m[0], 'register_state_dict_post_hook') else m[0]._register_state_dict_hook(lambda *a: None),
                 load=lambda: m[0]._register_load_state_dict_pre_hook(lambda *a: None), elsewhere=lambda: m[2].register_forward_hook(lambda *a: None))
    hooks[kind]()
    return m

@examples
@pytest.mark.parametrize('kind, folded', [('forward', 1), ('pre', 1), ('backward', 1), ('backward_pre', 1), ('state_dict', 2), ('load', 2), ('elsewhere', 2)])
def test_hooks(kind, folded, example):
    "A hook that sees or changes the value stops the fold, by its name; others stay where they are"
    model = spied(kind)
    new, report = fold(model, x, example=example)
    assert report.folded == folded
    if folded < 2: assert 'hook `spied.<locals>' in report['1'].why
    for a, b in zip(model.modules(), new.modules()):
        if type(a) is type(b): assert all(len(getattr(a, k)) == len(getattr(b, k)) for k in vars(a) if k.endswith('_hooks') and getattr(a, k) is not None)

@examples
def test_activation_stats(example):
    "fastai's `Hooks`, as `ActivationStats` puts them: on every layer, nothing folds; on the ReLUs alone, everything does"
    from fastai.callback.hook import Hooks
    for which, folded in ((lambda m: True, 0), (lambda m: isinstance(m, nn.ReLU), 2)):
        model = chain()
        with Hooks([m for m in model if which(m)], lambda m, i, o: o.mean()): assert fold(model, x, example=example)[1].folded == folded


# Wrappers

wrappers = dict(data_parallel=nn.DataParallel, averaged=lambda m: AveragedModel(m).eval(), compiled=torch.compile, compiled_in_data_parallel=lambda m: nn.DataParallel(torch.compile(m)))

@examples
@pytest.mark.parametrize('wrap', wrappers.values(), ids=wrappers)
def test_wrappers(wrap, example):
    torch._dynamo.reset()
    inner = chain()
    model, bn, want, before = wrap(inner), BN_Folder(), inner(x), snapshot(inner)
    new = bn.fold(model, *([x] if example else []))
    assert type(new) is type(model) and bn.report.folded == 2 and not norms(new)
    assert_untouched(inner, before)
    core = bn_folding.unwrapped(new)
    assert core is not inner and difference(want, core(x)).relative < 1e-12
    with torch.no_grad(): core[3].weight.zero_() # the wrapper runs the folded network, and no other
    if not any(isinstance(m, OptimizedModule) for m in new.modules()): assert difference(core(x), new(x)).relative < 1e-12
    assert torch.equal(inner(x), want)

def test_compiled_runs_what_was_folded():
    torch._dynamo.reset()
    inner = chain()
    model = torch.compile(inner, backend='eager')
    want = model(x)
    new = BN_Folder().fold(model)
    assert difference(want, new(x)).relative < 1e-12
    with torch.no_grad(): new._orig_mod[3].weight.zero_()
    assert difference(new._orig_mod(x), new(x)).relative < 1e-12 and torch.equal(model(x), want)
    assert BN_Folder().fold(model, x, inplace=True) is model and not norms(inner) and difference(want, model(x)).relative < 1e-12

def test_jit_lazy_sharded():
    for model, error, says in ((torch.jit.script(chain()), TypeError, 'the model is a torch.jit module'), (nn.Sequential(chain(), torch.jit.trace(chain(), x)), TypeError, '`1` is a torch.jit module'),
                               (nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d()).eval(), ValueError, '`0` (LazyConv2d) is not initialised')):
        with pytest.raises(error) as e: BN_Folder().fold(model)
        assert says in str(e.value)
    lazy = nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d()).double().eval()
    lazy(x)
    assert fold(randomise(lazy), x)[1].folded == 1

def test_quantised_and_observed_are_kept():
    ao = pytest.importorskip('torch.ao.quantization', reason='this PyTorch has no eager quantisation')
    if not hasattr(ao, 'prepare_qat'): pytest.skip('this PyTorch has no eager quantisation')
    model = nn.Sequential(ao.QuantStub(), *chain().float(), ao.DeQuantStub()).eval()
    model.qconfig = ao.get_default_qconfig('x86')
    observed = ao.prepare(model)
    observed(x.float())
    for m, why in ((observed, 'hook'), (ao.convert(observed), 'does not normalise as a BatchNorm')):
        before, bn = m(x.float()), BN_Folder()
        new = bn.fold(m, x.float())
        assert bn.report.kept == 2 and all(why in r.why for r in bn.report) and torch.equal(before, new(x.float()))
    model = nn.Sequential(ao.QuantStub(), *chain().float(), ao.DeQuantStub()).train()
    model.qconfig = ao.get_default_qat_qconfig('x86')
    qat = ao.prepare_qat(ao.fuse_modules_qat(model, [['1', '2']])).eval()
    bn = BN_Folder()
    assert torch.equal(qat(x.float()), bn.fold(qat, x.float())(x.float())) and bn.report.folded == 0


# Computed weights

computed = dict(weight_norm=parametrizations.weight_norm, old_weight_norm=nn.utils.weight_norm, spectral_norm=parametrizations.spectral_norm, old_spectral_norm=nn.utils.spectral_norm,
                pruned=lambda m: prune.l1_unstructured(m, 'weight', .5), pruned_twice=lambda m: prune.random_unstructured(prune.l1_unstructured(m, 'weight', .5), 'weight', .2))

@examples
@pytest.mark.parametrize('inplace', [False, True], ids=['copy', 'inplace'])
@pytest.mark.parametrize('f', computed.values(), ids=computed)
def test_bake(f, inplace, example):
    "Kept with the reason by default; with `bake`, made plain and folded"
    def make():
        m = chain()
        f(m[0])
        return m.eval()
    model, xs = make(), [x] if example else []
    report = fold(model, x, example=example)[1]
    assert not report['1'].folded and '(see `bake`)' in report['1'].why and report['4'].folded
    want, names, bn = model(x), [*model.state_dict()], BN_Folder(bake=True)
    assert bn.plan(model, *xs).folded == 2
    new = bn.fold(model, *xs, inplace=inplace)
    assert bn.report.folded == 2 and difference(want, new(x)).relative < 1e-12 and (new is model) == inplace
    assert not any(map(computing, new.modules())) and isinstance(new[0].weight, nn.Parameter)
    if not inplace: assert [*model.state_dict()] == names and computing(model[0]) and torch.equal(model(x), want)

def test_bake_a_pruned_batchnorm_and_a_frozen_layer():
    model = chain()
    prune.random_unstructured(model[1], 'weight', .5)
    parametrizations.weight_norm(model[3].requires_grad_(False))
    with pytest.raises(ValueError, match='`3` .* as in training'): BN_Folder(bake=True).fold(model) # what was registered is in training mode
    model.eval()
    assert '(see `bake`)' in fold(model, x)[1]['1'].why
    new = BN_Folder(bake=True).fold(model, x)
    assert not norms(new) and difference(model(x), new(x)).relative < 1e-12 and not new[3].weight.requires_grad and new[0].weight.requires_grad

@pytest.mark.parametrize('inplace', [False, True], ids=['copy', 'inplace'])
def test_a_failed_bake_puts_everything_back(inplace, monkeypatch):
    model = chain()
    parametrizations.weight_norm(model[0]); prune.l1_unstructured(model[3], 'weight', .5)
    model.eval()
    want, names, before = model(x), [*model.state_dict()], {k: v.clone() for k, v in model.state_dict().items()}
    monkeypatch.setattr(bn_folding, 'new_weights', fail)
    with pytest.raises(MemoryError): BN_Folder(bake=True).fold(model, x, inplace=inplace)
    assert [*model.state_dict()] == names and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(x), want) and computing(model[0]) and computing(model[3])


def test_bake_of_code_that_asks():
    "Baked and folded, the model must do what the original did"
    def forward(m, x): return m.bn(m.conv(x)) if hasattr(m.conv, 'parametrizations') else m.bn(m.conv(x)).relu()
    model = net(forward, conv=parametrizations.weight_norm(conv()), bn=nn.BatchNorm2d(4)).eval()
    with pytest.raises(FoldError, match='asks how they are computed'): BN_Folder(bake=True).fold(model, x)
    assert BN_Folder(bake=True).fold(nn.Sequential(model.conv, model.bn).eval(), x) is not None

def test_a_failed_bake_leaves_hooks_and_buffers():
    "A handle still removes its hook; a parametrized buffer is what it was"
    class Twice(nn.Module):
        def forward(self, w): return w*2
    layer, seen = nn.Module(), []
    layer.register_buffer('weight', torch.ones(2))
    nn.utils.parametrize.register_parametrization(layer, 'weight', Twice())
    model = chain()
    model.extra = layer
    handle = model[0].register_forward_hook(lambda *a: seen.append(1))
    with pytest.raises(ValueError): BN_Folder(bake=True).fold(model.eval(), x[:, :3], inplace=True)
    handle.remove()
    model[0](x)
    assert not seen and torch.equal(layer.weight, torch.full((2,), 2.))

# Training mode

def test_modes():
    "Judged where it matters: at the BatchNorm and at what stands between"
    for train, folded in (((), 2), ((0,), 2), ((2,), 2)):
        model = chain()
        for i in train: model[i].train()
        assert fold(model, x)[1].folded == folded
    model = chain()
    model[4].train()
    with pytest.raises(ValueError) as e: BN_Folder().fold(model, x)
    assert '`4` (BatchNorm2d) is in training mode' in str(e.value) and 'whole model' not in str(e.value)

@examples
def test_frozen_batchnorms_in_a_training_model(example):
    model = chain().train()
    for i in (1, 4): model[i].eval()
    new, report = fold(model, x, example=example)
    assert report.folded == 2 and new.training and new[0].training

@examples
def test_dropout_between(example):
    "A dropout between the layer and the BatchNorm is nothing in eval mode and stands between in training mode"
    for training in (False, True):
        model = net(lambda m, x: m.bn(m.drop(m.conv(x))), conv=conv(), drop=nn.Dropout(.5), bn=nn.BatchNorm2d(4))
        model.drop.train(training)
        bn = BN_Folder()
        new = bn.fold(model, *([x] if example else []))
        assert bn.report['bn'].folded != training
        torch.manual_seed(0); want = model(x)
        torch.manual_seed(0); assert difference(want, new(x)).relative < 1e-12

@examples
def test_twice_and_trained_on(example):
    "A folded model is an ordinary one: folding it again changes nothing, it learns, and what it learned is not changed by another fold"
    xs, new = [x] if example else [], BN_Folder().fold(chain(), x)
    def same(a, b): return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    bn = BN_Folder()
    assert same(new, bn.fold(new, *xs)) and len(bn.report) == 0
    opt, before = torch.optim.SGD(new.parameters(), .1), copy.deepcopy(new)
    new.train()(x).pow(2).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in new.parameters())
    opt.step()
    assert not same(new, before) and same(new.eval(), bn.fold(new, *xs))


# Faults

def fail(*args, **kwargs): raise MemoryError('out of memory')

class Fails(nn.Module):
    "Raises in the run numbered `at`"
    def __init__(self, at): super().__init__(); self.at = at
    def forward(self, x):
        if next(counts) == self.at: raise RuntimeError('at work')
        return x
counts = itertools.count(1)

def after(n, error):
    "A function that fails in its call numbered `n`, and else does what it stands for"
    calls = [0]
    def wrap(f):
        def g(*args, **kwargs):
            calls[0] += 1
            if calls[0] == n: raise error
            return f(*args, **kwargs)
        return g
    return wrap

faults = {'deepcopy': (apply.copy, 'deepcopy', 1), 'a weight': (apply, 'absorb', 2), 'a replacement': (apply, '_replacement', 2), 'a bias': (apply, '_gain_bias', 1), 'the trace': (bn_folding, 'trace_flow', 1),
          'the plan': (bn_folding, 'plan_folds', 1), 'the check': (bn_folding, 'run', 1), 'a float64 weight': (layers, 'flush', 3), 'the new weights': (bn_folding, 'new_weights', 1), 'the second trace': (bn_folding, 'same_outline', 1),
          'the record': (bn_folding, 'record_flow', 1)}
only_copy, only_example, only_symbolic = {'deepcopy'}, {'the check', 'the record'}, {'the second trace'}

@examples
@pytest.mark.parametrize('error', [MemoryError('out of memory'), KeyboardInterrupt()], ids=['memory', 'interrupt'])
@pytest.mark.parametrize('inplace', [False, True], ids=['copy', 'inplace'])
@pytest.mark.parametrize('at', faults)
def test_fault(at, inplace, error, example, monkeypatch):
    "Whatever step fails, the caller's model is bit for bit what it was: hooks, modes and random states too"
    if inplace and at in only_copy or example and at in only_symbolic or not example and at in only_example: pytest.skip('this step is not taken')
    model, (owner, name, n) = chain(), faults[at]
    model[2].register_forward_hook(lambda *a: None)
    model[2].train()
    before, states = snapshot(model), (random.getstate(), np.random.get_state()[1].tolist())
    parameters = dict(model.named_parameters())
    monkeypatch.setattr(owner, name, after(n, error)(getattr(owner, name)))
    with pytest.raises((type(error), ValueError, FoldError)): BN_Folder().fold(model, *([x] if example else []), inplace=inplace)
    monkeypatch.undo()
    assert_untouched(model, before)
    assert all(p is parameters[k] for k, p in model.named_parameters()) and states == (random.getstate(), np.random.get_state()[1].tolist())
    assert fold(model, x, example=example)[1].folded == 2

@pytest.mark.parametrize('inplace', [False, True], ids=['copy', 'inplace'])
def test_forward_that_raises(inplace):
    "In the recorded run, or in the check of the folded model"
    global counts
    for at, error in ((1, ValueError), (2, FoldError)): # what counts is not traced
        model = nn.Sequential(chain(), Fails(at)).eval()
        before, counts = snapshot(model), itertools.count(1)
        with pytest.raises(error) as e: BN_Folder().fold(model, x, inplace=inplace)
        assert 'at work' in str(e.value)
        assert_untouched(model, before)

class Sets(nn.Module):
    "Changes what it holds whenever it runs"
    def __init__(self, change): super().__init__(); self.conv, self.bn, self.change = conv(), nn.BatchNorm2d(4), change
    def forward(self, x):
        with torch.no_grad(): self.change(self)
        return self.bn(self.conv(x))
def set_(p, new): p.data = new
changes = dict(data=lambda m: set_(m.conv.weight, m.conv.weight.data*.5), dtype=lambda m: set_(m.conv.bias, m.conv.bias.data.double()*.5), of_a_buffer=lambda m: set_(m.bn.running_mean, m.bn.running_mean*.5),
               by_data=lambda m: m.bn.running_var.data.mul_(.5), in_place=lambda m: m.conv.weight.mul_(.5), training=lambda m: setattr(m.bn, 'training', True))


@pytest.mark.parametrize('inplace', [False, True])
@pytest.mark.parametrize('name', changes)
def test_what_a_run_changes_is_put_back(name, inplace):
    model = randomise(Sets(changes[name])).double()
    before = snapshot(model)
    want = [copy.deepcopy(model)(x) for _ in range(2)][1]
    new = BN_Folder().fold(model, x, inplace=inplace)
    if not inplace: assert_untouched(model, before)
    torch.testing.assert_close(new(x), want)


def test_no_hook_is_left_on_all_modules():
    "Nor a word of one: it would slow down every module in the process"
    hooks = lambda: {k: list(v) for k, v in vars(nn.modules.module).items() if k.startswith('_global_') and 'hook' in k and isinstance(v, dict)}
    before, model = hooks(), chain()
    BN_Folder().fold(model, x)
    with pytest.raises(ValueError): BN_Folder().fold(model, x[:, :3])
    assert hooks() == before and not nn.modules.module._has_any_global_hook()

@pytest.mark.parametrize('inplace', [False, True], ids=['copy', 'inplace'])
def test_example_that_does_not_fit(inplace):
    model = chain()
    before = snapshot(model)
    for args, kwargs in (((x[:, :3],), {}), ((x, x), {}), ((x.float(),), {}), ((), {'z': x})):
        with pytest.raises(ValueError) as e: BN_Folder().fold(model, *args, inplace=inplace, **kwargs)
        assert 'does not run on this example' in str(e.value)
    assert_untouched(model, before)


# Persistence

def test_persistence(tmp_path):
    "Saved whole or as weights, pickled, copied; and loaded into a network built and folded anew"
    def fresh(seed): return randomise(resnet18(num_classes=3), seed)
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    new = BN_Folder().fold(fresh(0))
    want = run(new, (image,), {})
    torch.save(new, tmp_path/'whole.pt')
    torch.save(new.state_dict(), tmp_path/'weights.pt')
    others = [torch.load(tmp_path/'whole.pt', weights_only=False), pickle.loads(pickle.dumps(new)), copy.deepcopy(new)]
    states = [torch.load(tmp_path/'weights.pt', weights_only=True)]
    safetensors = pytest.importorskip('safetensors.torch', reason='safetensors is not installed')
    safetensors.save_file(new.state_dict(), tmp_path/'weights.safetensors')
    states.append(safetensors.load_file(tmp_path/'weights.safetensors'))
    for state in states:
        skeleton = BN_Folder().fold(fresh(1)) # other statistics, other signs
        assert difference(want, run(skeleton, (image,), {})).relative > 1e-3
        skeleton.load_state_dict(state, strict=True)
        others.append(skeleton)
    for other in others: assert torch.equal(want, run(other, (image,), {}))


# Threads

def in_threads(*jobs):
    "Run `jobs` at once; whatever one raises is raised here"
    errors = []
    def guarded(job):
        try: job()
        except BaseException as e: errors.append(e)
    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for t in threads: t.start()
    for t in threads: t.join()
    if errors: raise errors[0]

@examples
def test_two_folds_at_once(example):
    models, images = [randomise(resnet18(num_classes=3), s) for s in range(2)], torch.randn(2, 3, 32, 32, dtype=torch.float64)
    def job(model):
        for _ in range(4): assert (report := fold_quietly(model, images, example)).folded == 20, [r.why for r in report if r.why]
    in_threads(*[lambda m=m: job(m) for m in models])

def fold_quietly(model, images, example):
    bn = BN_Folder()
    new = bn.fold(model, *([images] if example else []))
    with torch.no_grad(): assert difference(model(images), new(images)).relative < 1e-12
    return bn.report

def test_garbage_is_collected_while_another_thread_collects():
    "else what is left of a trace seems to be kept by someone"
    class Slow:
        def __init__(self): self.me = self
        def __del__(self):
            under_way.set()
            time.sleep(.2)
    class Cycle:
        def __init__(self): self.me = self
    under_way, freed = threading.Event(), []
    def elsewhere():
        Slow()
        gc.collect()
    def here():
        assert under_way.wait(5)
        with young_garbage() as collect:
            ref = weakref.ref(Cycle())
            collect()
            freed.append(ref() is None)
    in_threads(elsewhere, here)
    assert freed == [True]


@examples
def test_the_original_runs_in_another_thread(example):
    model, images, stop = randomise(resnet18(num_classes=3)), torch.randn(1, 3, 32, 32, dtype=torch.float64), threading.Event()
    with torch.no_grad(): want = model(images)
    def use():
        while not stop.is_set():
            with torch.no_grad(): assert torch.equal(model(images), want)
    def job():
        try:
            for _ in range(6): assert (report := fold_quietly(model, images, example)).folded == 20, [r.why for r in report if r.why]
        finally: stop.set()
    in_threads(use, job)

@examples
def test_another_thread_hooks_a_model_of_its_own(example):
    model, images, stop = randomise(resnet18(num_classes=3)), torch.randn(1, 3, 32, 32, dtype=torch.float64), threading.Event()
    def use():
        other = nn.Linear(2, 2)
        while not stop.is_set(): other.register_forward_hook(lambda *_: None).remove()
    def job():
        try: assert (report := fold_quietly(model, images, example)).folded == 20, [r.why for r in report if r.why]
        finally: stop.set()
    in_threads(use, job)

def test_a_run_that_cannot_be_recorded():
    "a tensor under `vmap` has no memory of its own to look at"
    model = net(lambda m, x: torch.vmap(lambda t: m.bn(m.conv(t[None]))[0])(x), conv=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4))
    x = torch.randn(2, 4, 5, 5).double()
    before = snapshot(model)
    with pytest.raises(ValueError, match='runs on this example, but what it does can.t be recorded.*without'): BN_Folder().fold(model, x)
    assert_untouched(model, before)


class Keeps(nn.Module):
    "Concatenates what a hook kept of its activation"
    def __init__(self, hooked): super().__init__(); self.conv, self.bn, self.act, self.last, self.features = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), {}; hooked(self)
    def forward(self, x):
        y = self.act(self.bn(self.conv(x)))
        return torch.cat([self.last(y), self.features['a']], 1)
    def keep(self, m, args, out): self.features['a'] = out
def hooked_by_a_function(m):
    features = m.features
    m.act.register_forward_hook(lambda layer, args, out: features.update(a=out.detach()))
def hooked_by_itself(m): m.act.register_forward_hook(lambda layer, args, out: m.features.update(a=out.detach()))
def hooked_by_a_method(m): m.act.register_forward_hook(m.keep)


@pytest.mark.parametrize('hooked, copies', [(hooked_by_a_function, False), (hooked_by_itself, False), (hooked_by_a_method, True)])
def test_a_hook_that_holds_on_to_the_original(hooked, copies):
    "a function is not copied: a copy's hook would write into the original, and a stale value would be read"
    given, other = torch.randn(2, 2, 4, 5, 5, dtype=torch.float64)
    model = randomise(Keeps(hooked))
    run(model, (given,), {}), model(given)
    before = snapshot(model)
    for example in ((), (given,)):
        if copies:
            new = BN_Folder().fold(model, *example)
            assert torch.allclose(model(other), new(other))
        else:
            with pytest.raises(TypeError, match='the hook .* on a ReLU holds on to a .* of the model'): BN_Folder().fold(model, *example)
            assert_untouched(model, before)
    want = model(other)
    assert torch.allclose(want, BN_Folder().fold(model, inplace=True)(other))


def test_a_function_that_holds_on_to_the_original():
    class Lambda(nn.Module):
        def __init__(self): super().__init__(); self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4); self.op = lambda x: self.conv(x)
        def forward(self, x): return self.bn(self.op(x))
    model, given = randomise(Lambda()), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    for example in ((), (given,)):
        with pytest.raises(FoldError, match='still calls a layer of the original.*inplace=True'): BN_Folder().fold(model, *example)
    want = model(given)
    assert torch.allclose(want, BN_Folder().fold(model, inplace=True)(given)) and type(model.bn) is nn.Identity


# What is compared, and what is given

class Mute(nn.Module):
    "Gives no tensor"
    def __init__(self): super().__init__(); self.body = chain()
    def forward(self, x): self.body(x)

@pytest.mark.parametrize('make, given', [(chain, x*float('nan')), (chain, x[:0]), (lambda: chain().to('meta'), x.to('meta')), (Mute, x)], ids=['nan', 'empty', 'meta', 'no tensor'])
def test_where_nothing_is_compared_nothing_is_said_to_be_equal(make, given):
    model, bn = make(), BN_Folder()
    new = bn.fold(model, given)
    assert bn.report.check.compared == 0 and 'nothing could be compared' in str(bn.report) and 'differ by' not in str(bn.report)
    assert 'nothing to compare' in str(compare(model, new, given, seconds=0))
    assert bn.fold(chain(), x) and bn.report.check.compared == x.numel() and 'differ by' in str(bn.report)


@pytest.mark.parametrize('norm', [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_baked_model_is_saved_whole_and_loads(norm):
    "PyTorch leaves hooks for loading where a weight is computed no more"
    torch.manual_seed(0)
    model = randomise(nn.Sequential(norm(conv()), nn.BatchNorm2d(4)))
    hooks = [*model[0]._load_state_dict_pre_hooks]
    new = BN_Folder(bake=True).fold(model, x)
    loaded = pickle.loads(pickle.dumps(new))
    loaded.load_state_dict(new.state_dict())
    assert torch.equal(loaded(x), new(x)) and [*model[0]._load_state_dict_pre_hooks] == hooks


@pytest.mark.parametrize('given, said', [((x.numpy(),), r'\(ndarray\), which holds no tensor: TypeError'), (('x',), r'\(str\), which holds no tensor'), ((None,), r'\(NoneType\), which'), ((1, 4, 6, 6), r'\(int, int, int, int\), which'),
                                         (([x],), r'\(list of \[3, 4, 6, 6\] torch.float64 on cpu\), which is one argument \(for several: `fold\(model, \*x\)`\)'), (({'input': x},), r'\*\*x')])
def test_an_example_that_is_no_tensor_is_named(given, said):
    with pytest.raises(ValueError, match=said) as e: BN_Folder().fold(chain(), *given)
    assert '\n' not in str(e.value) and len(str(e.value)) < 400

def test_what_the_model_holds_is_not_blamed_on_the_example():
    class Broken:
        @property
        def __class__(self): raise RuntimeError('no class')
    model = chain()
    vars(model)['held'] = Broken()
    with pytest.raises(RuntimeError, match='^no class'): BN_Folder().fold(model, x)

@pytest.mark.parametrize('call', [lambda: BN_Folder(chain()), lambda: BN_Folder('yes'), lambda: BN_Folder(series='False'), lambda: BN_Folder(None), lambda: BN_Folder().fold(chain(), inplace=x), lambda: BN_Folder().plan(chain(), x, inplace='no')])
def test_a_switch_is_on_or_off(call):
    with pytest.raises(TypeError, match='is a switch, True or False, not'): call()

@pytest.mark.parametrize('name', ['relu', 'series'])
def test_a_name_that_is_no_switch_of_fold(name):
    with pytest.raises(TypeError, match=f'takes no `{name}`: .*the switches of .* bake, through_relu, reparameterize, scales, series'): BN_Folder().fold(chain(), x, **{name: True})

def test_a_folder_shows_its_switches(): assert repr(BN_Folder(series=True)) == 'BN_Folder(bake=False, through_relu=False, reparameterize=False, scales=False, series=True)'

def test_an_argument_may_have_the_name_of_ours():
    model = net(lambda m, model: m.bn(m.conv(model)), conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4))
    new = BN_Folder().fold(model, model=x)
    assert not norms(new) and BN_Folder().plan(model, model=x).kept == 0 and compare(model, new, model=x, seconds=0).difference.relative < 1e-12

def test_a_plan_in_place_changes_nothing():
    model = nn.Sequential(chain(), parametrizations.weight_norm(conv())).double().eval()
    model.lock = threading.Lock()
    before, want, folder = snapshot(model), model(x), BN_Folder(bake=True, series=True)
    with pytest.raises(TypeError, match='inplace=True'): folder.plan(model, x)
    for example in ((), (x,)): assert folder.plan(model, *example, inplace=True).folded == 2
    assert_untouched(model, before)
    assert torch.equal(model(x), want) and computing(model[1])

@pytest.mark.parametrize('switches, without', [(dict(bake=True), '`bake`$'), (dict(bake=True, reparameterize=True), '`bake` and `reparameterize`$')])
def test_only_switches_that_are_on_are_named(switches, without):
    model = net(lambda m, x: m.bn(m.conv(x)) + m.conv.parametrizations.weight.original0.sum(), conv=parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), bn=nn.BatchNorm2d(4))
    with pytest.raises(FoldError, match=without): BN_Folder(**switches).fold(model, x)

def test_plots_draw_on_what_they_are_given():
    plt, model, bn = pytest.importorskip('matplotlib.pyplot'), chain(), BN_Folder()
    import fasterai.fold.plots
    found, ax = compare(model, bn.fold(model, x), x, seconds=0), plt.subplots()[1]
    assert found.plot(ax)[0] is found.plot(axs=[ax])[0] is ax
    found = compare(model, model, x, seconds=.01)
    axs = plt.subplots(2, 1)[1]
    assert [*found.plot(axs)] == [*axs] and axs[1].get_title() == f'speed-up {found.speedup:.2f}×'
    with pytest.raises(ValueError, match='`axs`: 2 to draw on, not 1'): found.plot(ax)
    assert [o.get_text() for o in bn.report.plot(names=None).get_xticklabels()] == ['1', '4']
    plt.close('all')


whole, part = (lambda t: t.detach().view(-1)), (lambda t: t.detach().view(-1)[5:7])
viewed = dict(a_buffer=lambda m: m.register_buffer('view', whole(m.conv.weight)), a_part=lambda m: m.register_buffer('view', part(m.conv.weight)), an_attribute=lambda m: setattr(m, 'view', part(m.conv.weight)),
              in_a_list=lambda m: setattr(m, 'views', [part(m.conv.weight)]), of_the_bias=lambda m: setattr(m, 'view', m.conv.bias.detach()[1:]), of_a_statistic=lambda m: setattr(m, 'view', m.bn.running_mean[1:3]),
              another_parameter=lambda m: setattr(m, 'view', nn.Parameter(part(m.conv.weight))))


@examples
@pytest.mark.parametrize('name', viewed)
def test_another_tensor_in_the_memory_of_a_weight(name, example):
    "who writes into it writes into the weight"
    class Clamps(nn.Module):
        def __init__(self): super().__init__(); self.conv, self.bn = conv(), nn.BatchNorm2d(4)
        def forward(self, x):
            (self.views[0] if hasattr(self, 'views') else self.view).clamp_(-.1, .1)
            return self.bn(self.conv(x))
    with torch.no_grad():
        model = randomise(Clamps())
        viewed[name](model)
        folder, twin = BN_Folder(), copy.deepcopy(model)
        viewed[name](twin) # a copy has a memory of its own for each
        want = twin(x)
        new = folder.fold(model, *([x] if example else []), inplace=True)
        assert not folder.report.folded and (example or 'is shared with `view' in folder.report['bn'].why)
        assert torch.equal(want, new(x))


def test_parameters_side_by_side_in_one_memory():
    model = chain()
    flat, at = torch.cat([p.detach().flatten() for p in model.parameters()]), 0
    for p in model.parameters(): p.data, at = flat[at:at+p.numel()].view_as(p), at + p.numel()
    assert not norms(fold(model, x)[0])


class Gate(nn.Module):
    "A parametrization that goes by an attribute, a buffer or an object of its own"
    def __init__(self, log): super().__init__(); self.by, self.log = 1., log; self.register_buffer('t', torch.ones(()))
    def forward(self, w): return w*self.by*self.t*(1 if len(self.log) < 9 else 2)
class Counting(Gate):
    def forward(self, w): self.by += .01; return w*(1 if self.by < 2 else 2)
class OfGradients(nn.Module):
    def forward(self, w): return w*(1 if torch.is_grad_enabled() else 2)
def sets(m, x): m.gate.by = float(len(x))
def fills(m, x): m.gate.t.mul_(.5)
def notes(m, x): m.log.append(len(x))
def nothing(m, x): m.seen = len(x)


@examples
@pytest.mark.parametrize('what, kind', [(sets, Gate), (fills, Gate), (notes, Gate), (nothing, Gate), (nothing, Counting), (nothing, OfGradients)])
def test_a_computed_weight_that_may_be_another(what, kind, example):
    class Parametrized(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.log = conv(), nn.BatchNorm2d(4), []
            self.gate = kind(self.log) if issubclass(kind, Gate) else kind()
            nn.utils.parametrize.register_parametrization(self.conv, 'weight', self.gate)
        def forward(self, x):
            y = self.bn(self.conv(x))
            what(self, x)
            return y
    model, folder = randomise(Parametrized()), BN_Folder(bake=True)
    new, plain = folder.fold(model, *([x] if example else [])), (what, kind) == (nothing, Gate)
    assert folder.report.folded == plain and bool(folder.report.notes) == (not plain and kind is not OfGradients)
    if folder.report.notes: assert folder.report.notes[0].startswith('`conv` still computes its weights: ')
    with torch.set_grad_enabled(kind is OfGradients):
        for given in (x, x[:1], *[x]*12): assert torch.allclose(model(given), new(given), rtol=1e-12)


class LeftOut(nn.Module):
    "A cache that is not saved, and so not copied"
    def __init__(self): super().__init__(); self.conv, self.bn, self.scale = conv(), nn.BatchNorm2d(4), torch.ones(())*3
    def __getstate__(self): return self.__dict__ | {'scale': None}
    def forward(self, x):
        y = self.bn(self.conv(x))
        y = y if self.scale is None else y*self.scale
        return y*2 if float(y.abs().max()) > 1e9 else y
class ById(nn.Module):
    "A copy is another object"
    def __init__(self): super().__init__(); self.conv, self.bn = conv(), nn.BatchNorm2d(4); self.gain = {id(self.bn): 2.}
    def forward(self, x): return self.bn(self.conv(x))*self.gain.get(id(self.bn), 1.)
gains = weakref.WeakKeyDictionary()
class ByAWeakKey(nn.Module):
    def __init__(self): super().__init__(); self.conv, self.bn = conv(), nn.BatchNorm2d(4); gains[self] = 2.
    def forward(self, x): return self.bn(self.conv(x))*gains.get(self, 1.)
@pytest.mark.parametrize('kind', [LeftOut, ById, ByAWeakKey])
@pytest.mark.parametrize('how', [{}, dict(bake=True), dict(series=True)])
def test_a_copy_that_would_compute_something_else(kind, how):
    model = randomise(kind())
    before = snapshot(model)
    with pytest.raises((TypeError, FoldError), match='inplace=True' if how or kind is not ByAWeakKey else 'another way'): BN_Folder(**how).fold(model, x)
    assert_untouched(model, before)
    want = run(model, (x,), {})
    assert difference(want, run(BN_Folder(**how).fold(model, x, inplace=True), (x,), {})).relative < 1e-12


def test_what_someone_set_on_a_parameter_is_copied():
    model = chain()
    for p in model.parameters(): p.no_decay = True
    assert all(p.no_decay for p in BN_Folder().fold(model).parameters() if p.dim() > 1)


def test_a_class_with_slots():
    class Slots(nn.BatchNorm2d): __slots__ = ('more',)
    model = randomise(nn.Sequential(conv(), Slots(4)))
    assert BN_Folder().fold(model) and BN_Folder().fold(model, x)
    with pytest.raises(TypeError, match='`__slots__`: fold a copy'): BN_Folder(series=True).fold(model)


def test_an_interrupted_fold_leaves_pytorch_as_it_was(monkeypatch):
    before = nn.Module.__call__, nn.Module.__getattr__, nn.Module.__init__
    def interrupt(*args): raise KeyboardInterrupt
    monkeypatch.setattr('fasterai.fold.ways.operations_in', interrupt) # while PyTorch is diverted
    with pytest.raises(KeyboardInterrupt): BN_Folder().fold(chain())
    assert (nn.Module.__call__, nn.Module.__getattr__, nn.Module.__init__) == before


def test_the_random_state_outlives_a_copy_that_draws():
    class Drawing(nn.Module):
        def __init__(self): super().__init__(); self.conv, self.bn = conv(), nn.BatchNorm2d(4)
        def __deepcopy__(self, memo): new = memo[id(self)] = Drawing().double().eval(); new.load_state_dict(self.state_dict()); return new
        def forward(self, x): return self.bn(self.conv(x))
    model, state = randomise(Drawing()), torch.get_rng_state()
    with pytest.raises(TypeError): BN_Folder().fold(model)
    assert torch.equal(state, torch.get_rng_state())


class WrittenOut(nn.Module):
    "A frozen BatchNorm of float32, which makes its input float32, too"
    def __init__(self):
        super().__init__()
        for n, o in dict(weight=torch.rand(4) + .5, bias=torch.randn(4), running_mean=torch.randn(4), running_var=torch.rand(4) + .5).items(): self.register_buffer(n, o)
    def forward(self, x):
        scale = self.weight*(self.running_var + 1e-5).rsqrt()
        return x*scale.view(1, -1, 1, 1) + (self.bias - self.running_mean*scale).view(1, -1, 1, 1)


@examples
@pytest.mark.parametrize('behind', [nn.Identity(), nn.Conv2d(4, 4, 1)])
def test_a_batchnorm_written_out_in_another_dtype(behind, example):
    model, folder, given = nn.Sequential(conv().bfloat16(), WrittenOut(), behind).eval(), BN_Folder(), x.bfloat16()
    new = folder.fold(model, *([given] if example else []))
    assert not folder.report.folded and torch.equal(model(given), new(given)) and new(given).dtype == torch.float32


@examples
@pytest.mark.parametrize('before, given', [(nn.ConvTranspose2d(4, 4, 2, 2), x), (conv(padding_mode='reflect'), x)])
def test_parts_of_known_channels_behind_a_layer_that_is_looked_into(before, given, example):
    "which are as many when the BatchNorm is gone"
    model = net(lambda m, x: sum(torch.tanh(t) for t in m.bn(m.before(x)).chunk(2, 1)), before=before, bn=nn.BatchNorm2d(4))
    assert not norms(fold(model, given, example=example)[0])
