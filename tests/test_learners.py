"fastai's own Learners: trained for a moment, folded, and used in every way that a Learner is used."
from copy import deepcopy

import numpy as np, pandas as pd, pytest, torch
from fastai.callback.hook import ActivationStats
from fastai.callback.training import GradientAccumulation
from fastai.tabular.all import *
from fastai.text.all import *
from fastai.vision.all import *
from fastai.vision.gan import *
from torch import nn

from fasterai.misc.all import *
from helpers import norms

for name in [n for n in globals() if n.startswith('test')]: del globals()[name] # fastai brings some along, which are no tests of ours
pytestmark = pytest.mark.filterwarnings('ignore')


def shapes(n=40, size=32):
    "Images of a bright square, whose side is the class"
    g = np.random.default_rng(0)
    images, labels, masks = [], [], []
    for i in range(n):
        side, at = 6 + 8*(i % 2), g.integers(0, size-16, 2)
        image, mask = g.integers(0, 60, (size, size, 3)).astype(np.uint8), np.zeros((size, size), np.uint8)
        image[at[0]:at[0]+side, at[1]:at[1]+side] += 150
        mask[at[0]:at[0]+side, at[1]:at[1]+side] = 1
        images.append(image); labels.append('large' if i % 2 else 'small'); masks.append(mask)
    return images, labels, masks


def image_dls(bs=8):
    images, labels, _ = shapes()
    block = DataBlock((ImageBlock, CategoryBlock), get_x=ItemGetter(0), get_y=ItemGetter(1), splitter=RandomSplitter(seed=0), batch_tfms=Normalize.from_stats(*imagenet_stats))
    return block.dataloaders(list(zip(images, labels)), bs=bs, num_workers=0)


def mask_dls():
    images, _, masks = shapes()
    block = DataBlock((ImageBlock, MaskBlock(['none', 'square'])), get_x=ItemGetter(0), get_y=ItemGetter(1), splitter=RandomSplitter(seed=0))
    return block.dataloaders(list(zip(images, masks)), bs=4, num_workers=0)


def quiet(learn): learn.remove_cb(ProgressCallback); return learn


def trained(learn, lr=1e-3):
    learn = quiet(learn)
    with learn.no_logging(): learn.fit(1, lr)
    return learn


def assert_same(learn, kept, exact=1e-4):
    "Fold, and compare over the whole validation set; `(new Learner, Check)`"
    before = deepcopy(learn.model.state_dict())
    new = learn.fold_bn(show=False)
    assert learn.model is not new.model and all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    assert new.bn_report.kept == len(norms(new.model)) <= kept, new.bn_report
    found = check(learn, new)
    assert found.difference.relative < exact, found
    assert found.equal in (None, 1.) or found.equal > .999 and found.difference.largest > 0
    return new, found


def test_vision_learner_in_every_use(tmp_path):
    set_seed(0)
    dls = image_dls()
    learn = trained(vision_learner(dls, resnet18, pretrained=False, metrics=[accuracy, F1Score()]))
    new, found = assert_same(learn, 1) # the head's second BatchNorm stands behind a ReLU and before a Dropout and a Linear: folded; its first behind a pool of two kinds
    assert found.metrics['accuracy'][0] == found.metrics['accuracy'][1] and {'loss', 'accuracy', 'f1_score'} == {*found.metrics}
    for k in ('dls', 'loss_func', 'splitter', 'path', 'model_dir'): assert getattr(new, k) is getattr(learn, k)
    close = lambda a, b: torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), atol=1e-4, rtol=1e-4)
    close(learn.validate(), new.validate())
    close(learn.get_preds()[0], new.get_preds()[0])
    image = dls.valid_ds[0][0]
    assert learn.predict(image)[0] == new.predict(image)[0]
    close(learn.predict(image)[2], new.predict(image)[2])
    with learn.no_bar(), new.no_bar():
        set_seed(1); a = learn.tta(n=2)[0]
        set_seed(1); close(a, new.tta(n=2)[0])
    a, b = (ClassificationInterpretation.from_learner(l).confusion_matrix() for l in (learn, new))
    assert (a == b).all()
    new.show_results(max_n=2)
    new.path = tmp_path
    new.export('new.pkl')
    loaded = load_learner(tmp_path/'new.pkl')
    close(loaded.predict(image)[2], new.predict(image)[2])
    new.save('weights')
    with torch.no_grad(): new.model[1][-1].weight.zero_()
    new.load('weights')
    close(learn.get_preds()[0], new.get_preds()[0])
    with new.no_logging(): new.fit(1, 1e-4) # it learns on
    with learn.no_logging(): learn.fit(1, 1e-4) # and so does the old one
    assert norms(learn.model)


def test_the_report_is_shown(capsys):
    learn = quiet(Learner(image_dls(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), AdaptiveConcatPool2d(), Flatten(), nn.Linear(8, 2)).eval()))
    learn.fold_bn()
    assert '1 of 1 BatchNorms folded' in capsys.readouterr().out
    learn.fold_bn(show=False)
    assert not capsys.readouterr().out


backbones = dict(torchvision=lambda dls: (vision_learner(dls, resnet34, pretrained=False), 1), timm=lambda dls: (vision_learner(dls, 'mobilenetv3_small_050', pretrained=False), 1),
                 xresnet=lambda dls: (Learner(dls, xresnet18(n_out=2), loss_func=CrossEntropyLossFlat()), 0),
                 own=lambda dls: (Learner(dls, nn.Sequential(ConvLayer(3, 8, stride=2), ResBlock(1, 8, 8), nn.AdaptiveAvgPool2d(1), Flatten(), LinBnDrop(8, 2))), 1))

@pytest.mark.parametrize('make', backbones.values(), ids=backbones)
def test_backbones(make):
    set_seed(0)
    learn, kept = make(image_dls())
    assert_same(trained(learn), kept)


def test_unet():
    "Its hooks keep the activations of the encoder: what they see is not changed"
    set_seed(0)
    learn = trained(unet_learner(mask_dls(), resnet18, pretrained=False, n_out=2, metrics=DiceMulti()))
    new, found = assert_same(learn, 5)
    learn.show_results(max_n=1); new.show_results(max_n=1)


def test_tabular():
    set_seed(0)
    g = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=g.normal(3, 2, 80), b=g.normal(-1, .5, 80), c=g.choice(['x', 'y', 'z'], 80)))
    df['y'] = np.where(df.a + (df.c == 'x') > 3, 'yes', 'no')
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], cat_names=['c'], cont_names=['a', 'b'], y_names='y', y_block=CategoryBlock(), bs=16)
    learn = trained(tabular_learner(dls, layers=[20, 10], n_out=2, metrics=accuracy))
    new, found = assert_same(learn, 0) # the one on the raw numbers too: behind it stands a concatenation, and then a Linear
    row = df.iloc[0]
    torch.testing.assert_close(learn.predict(row)[2], new.predict(row)[2])


def test_text_classifier():
    set_seed(0)
    texts = pd.DataFrame(dict(text=['good film and fun'*3, 'bad film and dull'*3]*12, label=['pos', 'neg']*12, is_valid=[False]*16 + [True]*8))
    vocab = ['xxunk', 'xxpad', 'good', 'bad', 'film', 'and', 'fun', 'dull']
    dls = TextDataLoaders.from_df(texts, text_col='text', label_col='label', valid_col='is_valid', tok_tfm=Tokenizer(BaseTokenizer()), text_vocab=vocab, bs=4, seq_len=8)
    config = awd_lstm_clas_config | dict(emb_sz=16, n_hid=16, n_layers=1)
    learn = trained(text_classifier_learner(dls, AWD_LSTM, pretrained=False, config=config, metrics=accuracy))
    assert len(norms(learn.model)) == 2
    new, found = assert_same(learn, 1)


class Siamese(nn.Module):
    def __init__(self): super().__init__(); self.body, self.head = nn.Sequential(ConvLayer(3, 8), ConvLayer(8, 8), nn.AdaptiveAvgPool2d(1), Flatten()), LinBnDrop(16, 2)
    def forward(self, a, b): return self.head(torch.cat([self.body(a), self.body(b)], 1))

def test_several_inputs():
    set_seed(0)
    xs = torch.randn(32, 2, 3, 8, 8)
    items = [(x[0], x[1], TensorCategory(int(x[0].mean() > x[1].mean()))) for x in xs]
    dls = Datasets(items, [[ItemGetter(i)] for i in range(3)], splits=[range(24), range(24, 32)], n_inp=2).dataloaders(bs=8, num_workers=0)
    new, found = assert_same(trained(Learner(dls, Siamese(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)), 1)
    assert new.bn_report['body.0.1'].folded # called twice, in the same way


def test_gan():
    "A GAN's generator and critic, folded from the Learner's model; its callbacks follow to the folded modules"
    set_seed(0)
    items = list(zip(torch.randn(16, 8), torch.randn(16, 3, 16, 16)))
    dls = Datasets(items, [[ItemGetter(0)], [ItemGetter(1)]], splits=[range(8), range(8, 16)]).dataloaders(bs=4, num_workers=0)
    learn = quiet(GANLearner.wgan(dls, basic_generator(16, 3, in_sz=8, n_extra_layers=1), basic_critic(16, 3, n_extra_layers=1, act_cls=partial(nn.LeakyReLU, .2))))
    with learn.no_logging(): learn.fit(1, 1e-4)
    learn.model.eval()
    z, images = torch.randn(4, 8), torch.randn(4, 3, 16, 16)
    for part, x in (('generator', z), ('critic', images)):
        model, bn = getattr(learn.model, part), BN_Folder()
        new = bn.fold(model, x)
        assert bn.report.kept == 0 < bn.report.folded
        torch.testing.assert_close(model(x), new(x), atol=1e-4, rtol=1e-4)


half = dict(mixed=lambda l: l.to_fp16(), back=lambda l: l.to_fp16().to_fp32(), bf16=lambda l: l.to_bf16())

@pytest.mark.parametrize('to', half.values(), ids=half)
def test_half_precision(to):
    "Mixed precision keeps float32 weights; the folded Learner has the same callback, for itself"
    set_seed(0)
    learn = quiet(to(vision_learner(image_dls(), resnet18, pretrained=False)))
    learn.model.eval()
    new = learn.fold_bn(show=False)
    assert {p.dtype for p in new.model.parameters()} == {torch.float32} and [type(c) for c in new.cbs] == [type(c) for c in learn.cbs]
    assert all(c.learn is new for c in new.cbs)
    x = learn.dls.one_batch()[0]
    with torch.no_grad(): torch.testing.assert_close(learn.model(x), new.model(x), atol=1e-4, rtol=1e-4)


def test_parallel():
    "`to_parallel` wraps the model while it trains; the folded Learner has the callback for itself"
    pytest.importorskip('accelerate', reason="fastai's distributed training needs accelerate")
    from fastai.distributed import ParallelTrainer
    learn = quiet(Learner(image_dls(), xresnet18(n_out=2), loss_func=CrossEntropyLossFlat(), cbs=[ParallelTrainer(device_ids=[])]))
    with learn.no_logging(): learn.fit(1, 1e-3)
    new, found = assert_same(learn, 0)
    assert type(new.model) is type(learn.model) and [c.learn for c in new.cbs if isinstance(c, ParallelTrainer)] == [new]


def test_distributed():
    "So does `to_distributed` (to train with it takes CUDA: fastai's distributed DataLoader shares its order through it)"
    pytest.importorskip('accelerate', reason="fastai's distributed training needs accelerate")
    from fastai.distributed import DistributedTrainer
    learn = quiet(Learner(image_dls(), xresnet18(n_out=2), loss_func=CrossEntropyLossFlat())).to_distributed(sync_bn=False, cpu=True)
    learn.model.eval()
    new = learn.fold_bn(show=False)
    assert new.bn_report.kept == 0 and [c.learn for c in new.cbs if isinstance(c, DistributedTrainer)] == [new]


def test_callbacks():
    "Hooks of a callback live while it trains, and stop no fold afterwards; one that holds a module of the model holds the folded one's"
    class Watch(Callback):
        def __init__(self, layer): self.layer = layer
    learn = Learner(image_dls(), xresnet18(n_out=2), loss_func=CrossEntropyLossFlat())
    learn.add_cbs([ActivationStats(with_hist=True), GradientAccumulation(8), Watch(learn.model[0])])
    new, found = assert_same(trained(learn), 0)
    assert new.watch.layer is new.model[0] and learn.watch.layer is learn.model[0]


def test_errors(tmp_path, monkeypatch):
    learn = quiet(Learner(image_dls(), xresnet18(n_out=2), loss_func=CrossEntropyLossFlat(), path=tmp_path))
    with learn.no_logging(): learn.lr_find(num_it=5, show_plot=False)
    learn.model.train()
    with pytest.raises(ValueError, match=r'is in training mode, and so is the whole model: call `.eval\(\)` first'): learn.fold_bn()
    learn.model.eval()
    assert learn.fold_bn(show=False).bn_report.kept == 0
    learn.export('l.pkl')
    loaded = load_learner(tmp_path/'l.pkl')
    with pytest.raises(ValueError, match=r'pass one, as in `fold\(learn, x\)`'): loaded.fold_bn()
    x = learn.dls.valid.one_batch()[0]
    new = loaded.fold_bn(x, show=False)
    torch.testing.assert_close(loaded.model(x), new.model(x), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match='no validation data'): check(loaded, new)
    def gone(self): raise RuntimeError('no such device')
    monkeypatch.setattr(type(learn.dls.valid), 'one_batch', gone)
    with pytest.raises(ValueError, match="no example could be taken from this Learner's data .*no such device.* pass one"): learn.fold_bn()


def test_fold_bn_makes_no_fold_in_place():
    learn = quiet(Learner(image_dls(), xresnet18(n_out=2), loss_func=CrossEntropyLossFlat()))
    learn.model.eval()
    before = len(norms(learn.model))
    with pytest.raises(TypeError, match=r'BN_Folder\(\).fold\(learn, inplace=True\)'): learn.fold_bn(inplace=True)
    with pytest.raises(TypeError, match='takes no `relu`.*the switches of'): learn.fold_bn(relu=True)
    assert len(norms(learn.model)) == before


def test_a_learner_folded_in_place_learns_on(tmp_path):
    "Its optimizer knew parameters that are gone"
    learn = trained(Learner(image_dls(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(4, 2)), loss_func=CrossEntropyLossFlat(), path=tmp_path))
    with pytest.raises(ValueError): BN_Folder().fold(learn, torch.randn(1, 7, 8, 8), inplace=True)
    assert learn.opt is not None
    assert BN_Folder().fold(learn, inplace=True) is learn.model
    learn.export('folded.pkl')
    before = [p.detach().clone() for p in learn.model.parameters()]
    with learn.no_logging(): learn.fit(1, .1)
    assert len(before) == 4 and not any(torch.equal(p, q) for p, q in zip(before, learn.model.parameters()))


def test_check_of_what_is_not_finite():
    "By the same rule as the check of a fold"
    learn = trained(Learner(image_dls(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(4, 2)), loss_func=CrossEntropyLossFlat()))
    new = learn.fold_bn(show=False)
    with torch.no_grad(): new.model[-1].bias[0] = float('nan')
    found = check(learn, new)
    assert found.difference.largest == float('inf') and found.by_item.isinf().all()
    with torch.no_grad(): learn.model[-1].bias[0] = float('nan')
    found = check(learn, new)
    assert 0 < found.difference.largest < 1e-4 and found.by_item.isfinite().all()
    for l in (learn, new):
        with torch.no_grad(): l.model[-1].bias.fill_(float('nan'))
    found = check(learn, new)
    assert found.equal is None and 'nothing to compare' in str(found)


def small(**kw): return quiet(Learner(image_dls(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(4, 2)).eval(), loss_func=CrossEntropyLossFlat(), **kw))


def test_check_says_what_it_takes():
    learn = small(metrics=accuracy)
    new = learn.fold_bn(show=False)
    for other in (None, new.model):
        with pytest.raises(TypeError, match='takes two Learners, not .* `compare'): check(learn, other)
        with pytest.raises(TypeError, match='takes two Learners'): check(other, learn)
    with pytest.raises(ValueError, match=r"different metrics: \['accuracy'\] and \[\]"): check(learn, small())
    for dls in (None, DataLoaders()):
        new.dls = dls
        with pytest.raises(ValueError, match='no validation data'): check(learn, new)
        with pytest.raises(ValueError, match='no validation data'): check(new, learn)
        with pytest.raises(ValueError, match='no data to take an example from'): new.fold_bn()


def test_check_keeps_metrics_of_one_name_apart():
    def other(p, y): return torch.tensor(0.)
    other.__name__ = 'accuracy'
    learn = small(metrics=[accuracy, other])
    found = check(learn, learn.fold_bn(show=False))
    assert [*found.metrics] == ['loss', 'accuracy', 'accuracy (2)'] and found.metrics['accuracy (2)'] == (0., 0.) != found.metrics['accuracy']


def test_check_is_drawn_where_items_are_infinite():
    learn = small()
    new = learn.fold_bn(show=False)
    with torch.no_grad(): new.model[-1].bias.fill_(float('nan'))
    found = check(learn, new)
    assert found.plot().get_title() == f'and {found.items} infinite'


def test_learner_example_says_what_it_takes():
    learn = small()
    for other in (None, learn.model):
        with pytest.raises(TypeError, match='takes a Learner, not'): learner_example(other)
    for n in (0, -1, '2', 2.5):
        with pytest.raises(ValueError, match='how many items'): learner_example(learn, n)
    assert [len(learner_example(learn, n)[0]) for n in (1, 4, None)] == [1, 4, 8]


def test_compare_says_what_it_takes():
    learn, x = small(), torch.randn(1, 3, 8, 8)
    for a, b in ((learn, learn.model), (learn.model, learn), (None, learn.model)):
        with pytest.raises(TypeError, match='compare takes an nn.Module, not .*`learn.model`'): compare(a, b, x)
    for o in (learn, None, nn.Linear):
        with pytest.raises(TypeError, match='count_parameters takes an nn.Module'): count_parameters(o)
    for seconds in (-1, '1', None, float('nan')):
        with pytest.raises(ValueError, match='0 or more'): compare(learn.model, learn.model, x, seconds=seconds)
    with pytest.raises(ValueError, match='nothing was timed'): compare(learn.model, learn.model, x, seconds=0).speedup
