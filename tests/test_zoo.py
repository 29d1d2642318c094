"A fast part of the zoo, and one network of each kind that is written in a way of its own."
import json, sys
from pathlib import Path

import pytest, torch

sys.path.insert(0, str(Path(__file__).parent.parent/'benchmarks'))
from common import build, cast, randomise
from helpers import assert_untouched, snapshot
from fasterai.fold.verify import difference, first_difference, run
from fasterai.misc.bn_folding import BN_Folder

goals = {(n['source'], n['name']): n['linear_fold'] for n in json.load(open(Path(__file__).parent.parent/'benchmarks'/'zoo.json'))['networks']}
names = [('timm', n) for n in ('test_resnet', 'test_byobnet', 'test_efficientnet', 'test_coatnet', 'efficientvit_b0', 'levit_128s', 'densenet121', 'repghostnet_050', 'xcit_nano_12_p8_224', 'hrnet_w18_small', 'mobilenetv3_small_050')]
names += [('torchvision', n) for n in ('googlenet', 'shufflenet_v2_x0_5', 'fasterrcnn_mobilenet_v3_large_320_fpn', 'lraspp_mobilenet_v3_large', 'ssdlite320_mobilenet_v3_large')]
names += [('pytorchcv', 'quartznet5x5_en_ls')]
goals['pytorchcv', 'quartznet5x5_en_ls'] = 33 # all


@pytest.mark.parametrize('source,name', names, ids=lambda v: v)
def test_network(source, name):
    model, args = build(source, name)
    model = randomise(model).double()
    args = cast(args, torch.float64)
    before, bn = snapshot(model), BN_Folder()
    for example in (args, ()):
        new = bn.fold(model, *example)
        assert_untouched(model, before)
        same = difference(run(model, args, {}), run(new, args, {})).relative < 1e-9
        assert same or 'ssd' in name and not first_difference(model, new, args, {}, bn.report.plan.places) # many equal scores, sorted another way
        if example: assert bn.report.folded >= goals[source, name]


@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v2', 'densenet121'])
def test_no_false_alarm_in_float32(name):
    model, args = build('torchvision', name)
    BN_Folder().fold(randomise(model), *args)


def test_fastai_models():
    from fastai.tabular.model import TabularModel
    from fastai.vision.all import create_vision_model
    from fastai.vision.models.unet import DynamicUnet
    from torchvision.models import densenet121, resnet18
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    encoder = torch.nn.Sequential(*list(resnet18().children())[:-2])
    cases = [(TabularModel([(5, 3), (4, 2)], 4, 2, [20, 10]), (torch.randint(0, 4, (6, 2)), torch.randn(6, 4).double()), 0),
             (DynamicUnet(encoder, 3, (64, 64)), (x,), 5), (create_vision_model(densenet121, 2, pretrained=False), (x,), 62)]
    for model, args, kept in cases:
        model, bn = randomise(model).double(), BN_Folder()
        new = bn.fold(model, *args)
        assert bn.report.kept <= kept, bn.report
        assert difference(run(model, args, {}), run(new, args, {})).relative < 1e-9
