"What the benchmarks share: networks, their examples, random statistics, the environment."
import ctypes, gc, json, os, platform, statistics, warnings
from datetime import date
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

warnings.filterwarnings('ignore')
here = Path(__file__).parent
results = here/'results'


def environment():
    "Where and with what a result was made"
    import fastai, timm, torchvision
    cpu = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.processor()) if os.path.exists('/proc/cpuinfo') else platform.processor()
    return dict(date=date.today().isoformat(), python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__,
                timm=timm.__version__, fastai=fastai.__version__, cpu=cpu, threads=torch.get_num_threads())


def is_norm(m):
    "A BatchNorm, or one frozen into buffers"
    return isinstance(m, _BatchNorm) or all(hasattr(m, n) for n in ('running_mean', 'running_var')) and not isinstance(m, nn.modules.batchnorm._NormBase)


def randomise(model, seed=0):
    "Random statistics and affine parameters, negative γ included, so that no wrong fold can hide"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if not is_norm(m) or m.running_mean is None: continue
            m.running_mean.normal_(0, .2, generator=g)
            m.running_var.uniform_(.5, 2, generator=g)
            if m.weight is not None:
                m.weight.uniform_(.5, 1.2, generator=g).mul_(torch.randint(0, 2, m.weight.shape, generator=g)*2-1)
                m.bias.normal_(0, .2, generator=g)
    return model.eval()


def _speech(m): return torch.randn(1, 64, 120), torch.tensor([110])

own_inputs = dict(raft_=({}, lambda m: (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128))), pfpcnet=({}, lambda m: (torch.randn(1, 1, *m.in_size),)),
                  jasper=(dict(from_audio=False), _speech), quartznet=(dict(from_audio=False), _speech),
                  voca=({}, lambda m: (torch.randn(2, 1, 16, 29), torch.tensor([1, 3]))), visemenet=({}, lambda m: (torch.randn(34, 8, 195), torch.full((34, 76), 3)))) # of pytorchcv's networks that take no picture of three colours, by how their names start


def build(source, name):
    "A network of timm, torchvision or pytorchcv with random weights, and an example: `(model, args)`"
    torch.manual_seed(0)
    if source == 'timm':
        import timm
        m = timm.create_model(name)
        return m, (torch.randn(1, *m.default_cfg['input_size']),)
    if source == 'pytorchcv':
        from pytorchcv.model_provider import get_model
        for start, (options, example) in own_inputs.items():
            if name.startswith(start): return (m := get_model(name, **options)), example(m)
        m = get_model(name)
        if getattr(m, 'in_size', (0, 0))[1] > 1024: m = get_model(name, in_size=tuple(s//4 for s in m.in_size)) # pictures of streets
        return m, (torch.randn(1, m.in_channels if hasattr(m, 'in_channels') else 3, *(m.in_size if hasattr(m, 'in_size') else (224, 224))),)
    import torchvision
    build_fn = torchvision.models.get_model_builder(name)
    kind = build_fn.__module__.split('.')[2]
    kw = dict(weights=None)
    if kind in ('detection', 'segmentation'): kw['weights_backbone'] = None
    if name in ('googlenet', 'inception_v3'): kw['init_weights'] = False
    m = build_fn(**kw)
    if kind == 'detection': return m, ([torch.rand(3, 160, 160)],)
    if kind == 'video': return m, (torch.randn(1, 3, 16, *[224 if name == 's3d' else 112]*2),)
    if kind == 'optical_flow': return m, (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128))
    size = 224 if name == 'maxvit_t' else 128
    return m, (torch.randn(1, 3, size, size),)


def cast(tree, dtype):
    "The same with its floating tensors in `dtype`"
    return tree_map(lambda t: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t, tree)


class BatchNormsRun(TorchDispatchMode):
    "Counts the BatchNorms that run, whatever module or function runs them; not those that take the statistics of their input"
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if 'batch_norm' in func.overloadpacket.__name__ and not (args[5:6] == (True,)): self.count += 1
        return func(*args, **(kwargs or {}))


def observe(model, args, places=()):
    "One run: its outputs, what the modules at `places` gave, and how many BatchNorms ran"
    seen = []
    keep = lambda m, x, y: seen.append([t.clone() for t in tree_leaves(y) if isinstance(t, torch.Tensor)]) # what follows may write into it
    handles = [model.get_submodule(p).register_forward_hook(keep) for p in places]
    with torch.no_grad(), BatchNormsRun() as ran: out = model(*tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, args))
    for h in handles: h.remove()
    return [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)], seen, ran.count


limit = 1e-9 # relative, float64: rounding is 1e-13, a wrong fold 1e-2 and more


def error_of(model, new, args, places):
    "How far the outputs of a folded network are off. A detector may sort equal scores another way: it is not, if all is alike at `places`, where a fold must leave it so, and both have them all"
    from fasterai.fold.verify import difference, first_difference, run # here, for old_fasterai.py reads this file, too, beside another fasterai
    error = difference(run(model, args, {}), run(new, args, {})).relative
    both = {n for n, _ in model.named_modules()} & {n for n, _ in new.named_modules()}
    return error if error < limit or not both.issuperset(places) or first_difference(model, new, args, {}, places, limit) else 0.


def load(path, key='networks'):
    "What an earlier run left in `path`"
    try: return json.load(open(path))[key]
    except FileNotFoundError: return {}


def save(path, **found):
    "Results with the environment they were made in"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix('.new') # a stopped run leaves the old file or the new one
    new.write_text(json.dumps(dict(environment=environment(), **found), indent=1))
    new.replace(path)


def give_back():
    "Hand freed memory back to the system"
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), 'malloc_trim'): libc.malloc_trim(0)


def quartiles(values):
    "First quartile, median, third quartile"
    return statistics.quantiles(values, n=4, method='inclusive')
