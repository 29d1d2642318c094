"The site: every reason is explained, every link leads somewhere, and a browser shows every page as it should."
import ast, json, re, shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

root = Path(__file__).parent.parent
site = root/'_docs'
pages = sorted(p for p in site.rglob('*.html')) if site.exists() else []
built = pytest.mark.skipif(not pages, reason='the site is not built: run `make docs`')


# ------------------------------------------------------------------ reasons

def template(node):
    "A string in the code as a reader meets it: `…` for what is filled in, without backticks"
    parts = [node] if isinstance(node, ast.Constant) else node.values
    return re.sub('…+', '…', ''.join(v.value if isinstance(v, ast.Constant) else '…' for v in parts).replace('`', '')).strip()


def strings(node):
    "The outermost strings under `node`"
    if isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and isinstance(node.value, str): yield template(node)
    else:
        for o in ast.iter_child_nodes(node): yield from strings(o)


def said(tree):
    "What a module may tell its user: in an error, as a reason, as the name of a reader"
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc and 'AttributeError' not in ast.dump(node.exc): yield from strings(node.exc)
        elif isinstance(node, ast.Return) and node.value: yield from strings(node.value)
        elif isinstance(node, (ast.Assign, ast.AugAssign)) and re.search('outside|why|strided|source|wrong|advice|notes', ast.unparse(node).split('=')[0]): yield from strings(node.value)


def reasons():
    for file in sorted((root/'fasterai').rglob('*.py')):
        if file.stem in ('_modidx', 'report', 'learner'): continue
        for text in said(ast.parse(file.read_text())):
            if re.search(r"[a-z]{2,} ([a-z]|…)|… [a-z]{2,}|…'s ", text): yield text


def test_every_reason_is_explained_and_no_other():
    explained = set(re.findall('``(.*?)``', (root/'docs'/'pages'/'limits.md').read_text()))
    assert not (missing := set(reasons()) - explained), 'docs/pages/limits.md does not explain:\n' + '\n'.join(sorted(missing))
    assert not (stale := explained - set(reasons())), 'nothing says:\n' + '\n'.join(sorted(stale))


# ------------------------------------------------------------------ links

class Page(HTMLParser):
    "The anchors and the addresses of a page"
    def __init__(self, path):
        super().__init__()
        self.ids,self.links,self.loads = set(),[],[]
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs.get('id'), attrs.get('name')}
        if tag == 'a' and attrs.get('href'): self.links.append(attrs['href'])
        elif tag in ('img', 'script', 'iframe', 'source') and attrs.get('src'): self.loads.append(attrs['src'])
        elif tag == 'link' and attrs.get('rel') in ('stylesheet', 'icon', 'preload', 'preconnect'): self.loads.append(attrs['href'])


@built
def test_links_resolve_and_nothing_is_loaded_from_elsewhere():
    read, wrong = {p: Page(p) for p in pages}, []
    for path, page in read.items():
        wrong += [f'{path.relative_to(site)} loads {o}' for o in page.loads if re.match('https?:|//', o)]
        for link in page.links + page.loads:
            if re.match(r'[a-z]+:|//', link): continue
            file, _, anchor = unquote(link).partition('#')
            target = (path.parent/file.partition('?')[0]).resolve() if file else path
            if not target.is_file() or anchor and target in read and anchor not in read[target].ids: wrong.append(f'{path.relative_to(site)} -> {link}')
    assert not wrong, '\n'.join(wrong)


@built
def test_what_a_reader_expects_is_there():
    api = (site/'misc.bn_folding.html').read_text()
    for part in ('<math ', '<summary>Source</summary>', 'copybutton.js', 'docs.fast.ai/learner.html#learner', 'torch.nn.Identity.html', 'Rewrite', '_sources/misc.bn_folding.md.txt'): assert part in api, part
    for p in root.glob('nbs/**/*.ipynb'):
        if '.ipynb_checkpoints' not in p.parts: assert (site/p.relative_to(root/'nbs').parent/f'{re.sub("^[0-9]+_", "", p.stem)}.html').is_file(), f'{p} has no page'


# ------------------------------------------------------------------ browser

@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    "Chromium without a window, on a site that is built"
    webdriver = pytest.importorskip('selenium.webdriver', reason='selenium is not installed')
    program, driver = (next(filter(None, map(shutil.which, o)), None) for o in (('chromium', 'google-chrome'), ('chromedriver',)))
    if not (program and driver): pytest.skip('no Chromium with its driver: `apt-get install chromium chromium-driver`')
    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    for o in ('headless', 'no-sandbox', 'disable-gpu', 'disable-quic', 'no-first-run', 'disable-dev-shm-usage', 'disable-background-networking', 'disable-component-update', 'disable-sync',
              f'user-data-dir={tmp_path_factory.mktemp("chromium")}'): options.add_argument(f'--{o}')
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    chrome.get('about:blank')
    chrome.get_log('performance') # of the page that the browser opened by itself
    yield chrome
    chrome.quit()


def width(browser, pixels): browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=pixels, height=900, deviceScaleFactor=1, mobile=pixels < 500))
def scheme(browser, name): browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[dict(name='prefers-color-scheme', value=name)]))


sticks_out = """
const scrolls = e => { for (; e && e.tagName != 'ARTICLE'; e = e.parentElement) if (/auto|scroll/.test(getComputedStyle(e).overflowX)) return true; return false; };
return [...document.querySelectorAll('article *')].filter(e => e.getBoundingClientRect().right > innerWidth && !scrolls(e)).map(e => e.outerHTML.slice(0, 80));
"""


@built
def test_pages_load_and_fit_a_phone(browser):
    wrong = []
    width(browser, 360)
    for p in pages:
        browser.get(p.as_uri())
        name = p.relative_to(site)
        wrong += [f'{name}: {o["message"]}' for o in browser.get_log('browser')]
        for o in (json.loads(o['message'])['message'] for o in browser.get_log('performance')):
            url = o['params'].get('request', {}).get('url', '') if o['method'] == 'Network.requestWillBeSent' else ''
            if url and not url.startswith(('file:', 'data:')): wrong.append(f'{name} asks for {url}')
            if o['method'] == 'Network.loadingFailed': wrong.append(f'{name}: {o["params"].get("errorText")}')
        wrong += [f'{name} sticks out: {o}' for o in browser.execute_script(sticks_out)]
    width(browser, 1280)
    assert not wrong, '\n'.join(wrong)


@built
def test_search_finds_the_folder(browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait
    browser.get((site/'search.html').as_uri() + '?q=BN_Folder')
    found = WebDriverWait(browser, 20).until(lambda b: [o.get_attribute('href') for o in b.find_elements(By.CSS_SELECTOR, '#search-results li a')])
    assert any('misc.bn_folding.html' in o for o in found), found
    assert not (said := browser.get_log('browser')), said


contrast = '''
const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => (v /= 255) <= .04045 ? v/12.92 : ((v + .055)/1.055)**2.4); return .2126*r + .7152*g + .0722*b; };
const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$|transparent/.test(c)) return c; } return 'rgb(255,255,255)'; };
return [...document.querySelectorAll('div.output td, div.output th, div.output code')].map(e => { const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x); return (a + .05)/(b + .05); });
'''


@built
@pytest.mark.parametrize('name', ['light', 'dark'])
def test_the_report_is_legible(browser, name):
    scheme(browser, name)
    browser.get((site/'fold.report.html').as_uri())
    background = browser.execute_script('return getComputedStyle(document.body).backgroundColor')
    assert (sum(map(int, re.findall(r'\d+', background)[:3])) > 384) == (name == 'light'), background
    found = browser.execute_script(contrast)
    assert len(found) > 8 and min(found) >= 4.5, found


@built
def test_the_networks_can_be_filtered(browser):
    from selenium.webdriver.common.by import By
    browser.get((site/'what_folds.html').as_uri())
    rows = lambda: [o for o in browser.find_elements(By.CSS_SELECTOR, '#zoo tbody tr') if o.is_displayed()]
    every = len(rows())
    browser.find_element(By.ID, 'find').send_keys('densenet')
    assert 0 < len(rows()) < every
    browser.find_element(By.ID, 'find').send_keys('zzz')
    assert not rows()
