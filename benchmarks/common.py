"What the benchmarks share: networks, their examples, random statistics, the environment."
import os, platform, warnings
from datetime import date
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

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


def build(source, name):
    "A network of timm, torchvision or pytorchcv with random weights, and an example: `(model, args)`"
    torch.manual_seed(0)
    if source == 'timm':
        import timm
        m = timm.create_model(name)
        return m, (torch.randn(1, *m.default_cfg['input_size']),)
    if source == 'pytorchcv':
        from pytorchcv.model_provider import get_model
        m = get_model(name)
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
