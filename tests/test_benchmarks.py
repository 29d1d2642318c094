"The core of each benchmark on one tiny network, so that the scripts stay alive. Numbers that depend on the machine are not judged."
import os, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import pytest, torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent/'benchmarks'))
import beyond, common, cost, coverage, fuzz, latency, limit, networks, numerics, old_fasterai, peers
from fasterai.misc.bn_folding import BN_Folder

tiny = 'timm', 'test_resnet'


def test_coverage():
    r = coverage.measure(*tiny)
    assert all(r[k]['folded'] == r[k]['total'] == 15 and not r[k]['wrong'] for k in ('with', 'without'))
    assert 'FEWER' in next(coverage.summary({'a': dict(r, goal=16)})) and 'FEWER' not in next(coverage.summary({'a': dict(r, goal=15)}))


def test_coverage_of_what_does_not_run():
    r = coverage.measure('timm', 'no_such_network')
    assert 'no_such_network' in r['unrun'] and 'not run' in next(coverage.summary({'a': r}))


def test_beyond():
    import time
    r = beyond.measure('timm', 'test_byobnet', .01, time.perf_counter, 2)
    assert all(r[s]['gone']['batchnorms'] == 14 and r[s]['error'] < 1e-9 for s in beyond.switches) and '14 batchnorms' in beyond.table({'a': r}) and 'wrong: none' in beyond.table({'a': r})
    r = beyond.measure('timm', 'test_vit', .01, time.perf_counter, 1)
    assert r['scales']['gone']['scales'] > 0 and r['scales']['error'] < 1e-9 and r['scales']['time'] and '+12 scales' in beyond.table({'a': r})


def test_networks(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, 'cache', tmp_path/'sizes.json')
    assert networks.size(*tiny)['batchnorms'] == 15
    found = networks.sizes('timm', ['test_resnet', 'test_vit', 'test_byobnet', 'no_such_network'])
    assert 'test_vit' not in found and found['no_such_network']['batchnorms'] is None
    assert networks.sizes('timm', ['test_resnet']) == {'test_resnet': found['test_resnet']}
    assert [n['name'] for n in networks.in_order('timm', found)] == ['no_such_network', *sorted(('test_resnet', 'test_byobnet'), key=lambda n: found[n]['parameters'])]


def test_results_are_kept(tmp_path):
    common.save(tmp_path/'r.json', networks=dict(a=1))
    assert common.load(tmp_path/'r.json') == dict(a=1) and common.load(tmp_path/'none.json') == {}


def test_batchnorms_that_run_are_counted():
    net, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.InstanceNorm2d(4)).eval(), torch.randn(2, 3, 5, 5)
    net.add_module('again', net[1])
    assert common.observe(net, (x,))[2] == 2 and common.observe(net[0], (x,))[2] == 0


def test_peers():
    wrong = dict(peers.in_eager, wrong=lambda m, args: nn.Sequential(peers.ours(m, args), nn.Softplus()), fails=lambda m, args: 1/0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, 'in_eager', wrong)
        r = peers.measure(*tiny, wrong, None)
    assert {k: peers.cell(v) for k, v in r.items()} == {'ours, with an example': '15/15', 'ours, without': '15/15', 'ours, reparameterize=True': '15/15', 'torch.fx fuse': '15/15', 'siblings, fuse_conv_bn_eval': '14/15', 'torch.ao fuse_modules': '14/15',
                                                        'timm reparameterize_model': '0/15', 'wrong': '15/15 WRONG', 'fails': 'crashed'}
    assert 'removed and right' in peers.table({'a': r}, list(r))


def test_peer_onnxruntime():
    for name in ('onnx', 'onnxscript', 'onnxruntime'): pytest.importorskip(name)
    r = peers.by_onnx(*tiny, 15)
    assert r['right'] and r['exported'] == r['removed'] == 15 and not r['made_convolutions']
    r = peers.by_onnx('timm', 'resnetv2_18', 17) # a BatchNorm behind a sum can't be removed
    assert r['right'] and r['removed'] == 8 and r['made_convolutions'] == 9


def test_the_other_fasterai_is_told_from_this_one(tmp_path):
    assert 'was imported instead' in old_fasterai.fold(*tiny, [], str(tmp_path/'out'))['absent']
    (tmp_path/'fasterai.py').write_text("__version__ = 'another'")
    done = subprocess.run([sys.executable, old_fasterai.__file__], env={**os.environ, 'PYTHONPATH': str(tmp_path)}, input='', capture_output=True, text=True)
    assert done.stdout == 'ready\n', done.stderr # it starts beside another package of this name


def test_latency():
    models, x = latency.turned(latency.variants(*(mx := latency.prepare(*tiny, 32))), mx[1], 'bfloat16', 'channels_last', 2)
    assert x.shape == (2, 3, 32, 32) and x.is_contiguous(memory_format=torch.channels_last) and all(p.dtype == torch.bfloat16 for m in models.values() for p in m.parameters())
    r = latency.measure(models, x, SimpleNamespace(seconds=0, clock='cpu', compile=False))
    assert r['rounds'] == 5 and all(r[f'{k} / unfolded'][0] <= r[f'{k} / unfolded'][2] for k in ('ours', 'fx', 'limit'))
    assert '[' in latency.table({'a 1': r}) and next(latency.summary({'a 1': r, 'a 2': dict(crashed='')})).startswith('a ')


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.down, self.kept = nn.Conv2d(3, 3, 1), nn.Identity(), nn.Sequential(nn.Identity(), nn.Conv2d(3, 3, 1)), nn.Identity()

    def half(self, x): return self.bn(self.conv(x)) if self.bn is not None else x
    def forward(self, x): return self.half(x) + self.down(x) + self.kept.forward(x)


def test_the_limit_has_no_identity():
    block, x = Block(), torch.randn(1, 3, 4, 4)
    new = limit.without_identities(block)
    assert torch.equal(new(x), block(x)) and limit.identities(block) == 3
    assert [n for n, m in new.named_modules() if isinstance(m, nn.Identity)] == ['kept'] and isinstance(new.down, nn.Conv2d) # `kept` is used in a way that can't be written away
    net, args = common.build('torchvision', 'resnet18')
    ours = BN_Folder().fold(net.eval())
    new = limit.without_identities(ours)
    with torch.no_grad(): assert limit.identities(ours) == 20 and limit.identities(new) == 0 and torch.equal(new(*args), ours(*args))


def test_numerics():
    r = numerics.measure(*tiny, torch.bfloat16, 1, batch=2)
    assert all(0 < r[k]['rms'] < .5 for k in ('unfolded', 'folded', 'peer', 'folded, then cast'))
    assert 'of 1' in '\n'.join(numerics.table({'a': r}))
    assert numerics.subnormal(0, latency.clocks['cpu'], channels=4)['rounds'] == 5


def test_fuzz_and_cost():
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    seen, source = fuzz.try_one(0, [x, x])
    assert not source and seen['crashed'] == seen['wrong'] == 0
    assert cost.interleaved(2, a=lambda: None)['a'] >= 0 and len(cost.chain(2)) == 6
