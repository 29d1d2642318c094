"Where a folded model goes next: each way agrees with the model that was not folded, and no BatchNorm comes back."
import os, shutil

import pytest, timm, torch
from torch import nn
from torch.export import Dim
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.resnet import BasicBlock, ResNet

from fasterai.fold.verify import difference, run
from fasterai.misc.bn_folding import BN_Folder
from helpers import norms, randomise

pytestmark = pytest.mark.filterwarnings('ignore')
x, y = (torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(n)) for n in (2, 5)) # the second: another batch size


class Block(nn.Module):
    "BatchNorm and ReLU before each convolution; over an identity shortcut the first BatchNorm must stay"
    def __init__(self, n, shortcut):
        super().__init__()
        self.bn1, self.conv1, self.bn2, self.conv2 = nn.BatchNorm2d(n), nn.Conv2d(n, n, 3, padding=1), nn.BatchNorm2d(n), nn.Conv2d(n, n, 3, padding=1)
        self.shortcut = nn.Conv2d(n, n, 1) if shortcut else None

    def forward(self, x):
        a = self.bn1(x).relu()
        return (x if self.shortcut is None else self.shortcut(a)) + self.conv2(self.bn2(self.conv1(a)).relu())


def preact(shortcut):
    "A pre-activation network with a fastai head"
    head = nn.BatchNorm1d(8), nn.Linear(8, 16, bias=False), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 4)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), Block(8, shortcut), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


builders = dict(resnet=lambda: ResNet(BasicBlock, [1]*4, num_classes=4), timm=lambda: timm.create_model('test_efficientnet', num_classes=4),
                mobilenet=lambda: MobileNetV2(4, .25, [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]), preact=lambda: preact(True), kept=lambda: preact(False))
every = pytest.mark.parametrize('net', builders)
made = {}


def make(net):
    "`(model, folded model, report)`, the same ones each time"
    if net not in made:
        torch.manual_seed(0)
        model, bn = randomise(builders[net]()).float(), BN_Folder()
        new = bn.fold(model, x)
        assert (bn.report.kept > 0) == (net == 'kept') and bn.report.folded > 2 and len(norms(model)) == len(bn.report)
        made[net] = model, new, bn.report
    return made[net]


def agree(model, out, x, limit=1e-5): assert difference(run(model, (x,), {}), out).relative < limit
def count(graph): return sum('batch_norm' in str(n.target) for n in graph.nodes)


@pytest.fixture
def onnx():
    pytest.importorskip('torch', minversion='2.6', reason='before PyTorch 2.6 torch.onnx.export(dynamo=True) is missing, or a preview')
    for name in ('onnx', 'onnxscript', 'onnxruntime'): pytest.importorskip(name)
    return lambda model, **kw: torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=({0: Dim('batch')},), verbose=False, **kw)


def onnx_norms(program): return sum(n.op_type == 'BatchNormalization' for n in program.model_proto.graph.node)


@every
def test_onnx(net, onnx):
    from onnxruntime import InferenceSession
    model, new, report = make(net)
    program = onnx(new)
    assert onnx_norms(program) == report.kept
    session = InferenceSession(program.model_proto.SerializeToString(), providers=['CPUExecutionProvider'])
    for a in (x, y): agree(model, torch.from_numpy(session.run(None, {session.get_inputs()[0].name: a.numpy()})[0]), a)


def test_onnx_has_them_where_nothing_was_folded(onnx):
    model, _, report = make('preact')
    assert onnx_norms(onnx(model, optimize=False)) == len(report)
    assert onnx_norms(onnx(model)) > report.kept # the exporter fuses those behind a convolution, not those before a layer


@every
def test_export(net):
    model, new, report = make(net)
    was, now = (torch.export.export(m, (x,), dynamic_shapes=({0: Dim('batch')},)) for m in (model, new))
    assert (count(was.graph), count(now.graph)) == (len(report), report.kept)
    for a in (x, y): agree(model, now.module()(a), a)


@pytest.mark.parametrize('how', ['trace', 'script'])
@every
def test_jit(net, how):
    model, new, report = make(net)
    was, now = (torch.jit.trace(m, x) if how == 'trace' else torch.jit.script(m) for m in (model, new))
    norms = lambda m: str(m.inlined_graph).count('batch_norm(')
    assert norms(now) == report.kept < norms(was)
    for a in (x, y): agree(model, now(a), a)


@pytest.mark.skipif(not shutil.which(os.environ.get('CXX', 'g++')), reason='no C++ compiler')
@pytest.mark.parametrize('freezing', [False, True])
def test_compile(freezing):
    from torch._inductor import config
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 4))).float()
    new = BN_Folder().fold(model, x)
    assert not norms(new)
    torch._dynamo.reset()
    with torch.no_grad(), config.patch(freezing=freezing): agree(model, torch.compile(new)(x), x)


@pytest.mark.parametrize('net', ['mobilenet', 'timm', 'preact'])
def test_quantise(net):
    pytest.importorskip('torch', minversion='2.8', reason='torchao quantises exported graphs from PyTorch 2.8 on')
    pt2e = pytest.importorskip('torchao.quantization.pt2e.quantize_pt2e', exc_type=ImportError)
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    model, new, report = make(net)
    batch = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def prepare(model):
        graph = torch.export.export(model, (batch,)).module()
        return pt2e.prepare_pt2e(graph, x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config()))

    was, now = prepare(model), prepare(new)
    assert count(now.graph) == 0 and (count(was.graph) > 0) == (net == 'preact') # the quantiser fuses those behind a convolution alone
    with torch.no_grad():
        want = model(batch)
        for graph in (now, was)[:1 if net == 'preact' else 2]: # with a BatchNorm left in it, converting takes half a minute
            graph(batch)
            quantised = pt2e.convert_pt2e(graph)
            assert sum('dequantize_per_channel' in str(n.target) for n in quantised.graph.nodes) == sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in new.modules())
            error = ((quantised(batch)-want).pow(2).mean()/want.var()).sqrt().item()
            assert error < .1, error


@pytest.mark.parametrize('example', [(x,), ()], ids=['example', 'code alone'])
@every
def test_safetensors(net, example, tmp_path):
    st = pytest.importorskip('safetensors.torch')
    model, bn = make(net)[0], BN_Folder()
    new = bn.fold(model, *example)
    st.save_file(new.state_dict(), tmp_path/'folded.safetensors')
    skeleton = bn.fold(builders[net]().eval(), *example)
    assert difference(run(model, (x,), {}), run(skeleton, (x,), {})).relative > 1e-2
    skeleton.load_state_dict(st.load_file(tmp_path/'folded.safetensors'), strict=True)
    assert torch.equal(run(new, (x,), {}), run(skeleton, (x,), {}))
    agree(model, run(skeleton, (x,), {}), x)
