"Sphinx's settings. The pages are staged by `build.py`."
from configparser import ConfigParser
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

docs = Path(__file__).parent
settings = ConfigParser(delimiters=['='])
settings.read(docs.parent/'settings.ini', encoding='utf-8')
project, release, author = (settings['DEFAULT'][o] for o in ('lib_name', 'version', 'author'))
copyright = f'{author}. Apache 2.0'

extensions = ['myst_parser', 'sphinx_copybutton']
myst_enable_extensions = ['dollarmath', 'colon_fence', 'deflist']
myst_heading_anchors = 4
copybutton_selector = 'div:not(.output):not(.signature) > div.highlight > pre'
html_theme = 'furo'
html_title = f'{project} {release}'
html_static_path = [str(docs/'_static')]
html_css_files = ['site.css']
html_show_search_summary = False # fetched page by page, which a browser does not do from the file system
html_math_renderer = 'mathml'
html_theme_options = {'top_of_page_buttons': ['view']}
pygments_style, pygments_dark_style = 'friendly', 'monokai'


def mathml(block):
    "A renderer of formulas that needs no JavaScript"
    def visit(self, node):
        self.body.append(convert(node.astext(), display='block' if block else 'inline'))
        raise nodes.SkipNode
    return visit, None


def setup(app): app.add_html_math_renderer('mathml', mathml(False), mathml(True))
