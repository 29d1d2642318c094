"Hands `settings.ini`, the one packaging source, to setuptools."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
lines = lambda text: [o.strip() for o in text.strip().splitlines()]
group, _, entry = cfg['entry_points'].strip().partition(' = ')

setup(
    version=cfg['version'], author=cfg['author'], author_email=cfg['author_email'], license=cfg['license'],
    keywords=cfg['keywords'].split(), classifiers=lines(cfg['classifiers']), python_requires=f">={cfg['min_python']}",
    url=cfg['git_url'], project_urls={'Documentation': cfg['doc_host']},
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=[cfg['lib_path'], f"{cfg['lib_path']}.*"]), include_package_data=True,
    install_requires=cfg['requirements'].split(), extras_require={'dev': cfg['dev_requirements'].split()},
    entry_points={group: [entry]}, zip_safe=False)
