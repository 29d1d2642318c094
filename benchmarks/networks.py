"Which networks there are: the zoo, one of every pytorchcv family, torchvision's, and timm's below a size."
import json
from collections import defaultdict

import torch
from fastprogress import progress_bar

from common import build, here, is_norm, load

cache = here/'.cache'/'sizes.json'


def size(source, name):
    "Parameters and BatchNorms; on the meta device, which takes no memory, where the network can be built there. Nothing where it can't be built at all"
    for device in ('meta', 'cpu'):
        try:
            with torch.device(device): model, _ = build(source, name)
            return dict(parameters=sum(p.numel() for p in model.parameters()), batchnorms=sum(map(is_norm, model.modules())))
        except Exception: continue # networks that compute while they are built; networks that need a package that is not here are told by `coverage.py`
    return dict(parameters=0, batchnorms=None)


def sizes(source, names):
    "`size` of each, remembered"
    known = load(cache, 'sizes')
    cache.parent.mkdir(exist_ok=True)
    for i, name in enumerate(progress_bar(names)):
        if f'{source}/{name}' not in known: known[f'{source}/{name}'] = size(source, name)
        if i%50 == 0 or i == len(names) - 1: cache.write_text(json.dumps(dict(sizes=known)))
    return {name: s for name in names if (s := known[f'{source}/{name}'])['batchnorms'] != 0}


def in_order(source, found): return [dict(source=source, name=name) for name in sorted(found, key=lambda n: found[n]['parameters'])]


def zoo(path=here/'zoo.json'): return json.load(open(path))['networks']


def pytorchcv():
    "The smallest network of every family (a module of pytorchcv is one)"
    from pytorchcv.model_provider import _models
    families, found = defaultdict(list), sizes('pytorchcv', list(_models))
    for name in found: families[_models[name].__module__].append(name)
    smallest = [min(names, key=lambda n: found[n]['parameters']) for names in families.values()]
    return in_order('pytorchcv', {n: found[n] for n in smallest})


def torchvision():
    "All, smallest first"
    import torchvision.models
    return in_order('torchvision', sizes('torchvision', [n for n in torchvision.models.list_models() if not n.startswith('quantized_')]))


def timm(limit):
    "All below `limit` million parameters, smallest first"
    import timm
    found = sizes('timm', timm.list_models())
    return in_order('timm', {n: s for n, s in found.items() if s['parameters'] < limit*1e6})
