"""What people ask a notebook for works inside the sandbox: numbers, tables, plots, symbols, the library."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator

import pytest

from mlx_gptoss.errors import ToolError
from mlx_gptoss.tools.python import PythonTool


@pytest.fixture(scope="module")
def tool() -> Iterator[PythonTool]:
    try:
        made = PythonTool()
    except ToolError as error:
        pytest.skip(f"this machine offers no isolation: {error}")
    yield made
    made.close()


CELLS = {
    "linear algebra": """
import numpy as np
a = np.random.default_rng(0).normal(size=(200, 200))
x = np.linalg.solve(a, np.ones(200))
bool(np.allclose(a @ x, 1)), bool(np.allclose(np.linalg.eigvalsh(a + a.T).sum(), 2 * np.trace(a)))""",
    "linear algebra in threads": """
import numpy as np
from concurrent.futures import ThreadPoolExecutor
def of(seed):
    a = np.random.default_rng(seed).normal(size=(60, 60))
    return bool(np.allclose(np.linalg.inv(a) @ a, np.eye(60)))
with ThreadPoolExecutor(4) as pool: right = list(pool.map(of, range(8)))
all(right), len(right) == 8""",
    "a table": """
import csv, itertools, statistics
with open('table.csv', 'w', newline='') as file:
    csv.writer(file).writerows([['name', 'size'], *([n, i] for i, n in enumerate('abab'))])
rows = sorted(csv.DictReader(open('table.csv')), key=lambda row: row['name'])
groups = itertools.groupby(rows, key=lambda row: row['name'])
means = {n: statistics.mean(int(row['size']) for row in group) for n, group in groups}
means == {'a': 1, 'b': 2}, True""",
    "a database": """
import sqlite3
with sqlite3.connect('a.db') as db: db.execute('create table t (x)'); db.execute('insert into t values (7)')
sqlite3.connect('a.db').execute('select x from t').fetchall() == [(7,)], True""",
    "asyncio": """
import asyncio
async def twice(x): await asyncio.sleep(0.001); return await asyncio.to_thread(lambda: 2 * x)
asyncio.run(twice(2)) == 4, True""",
    "files mapped into memory": """
import numpy as np
m = np.memmap('m.bin', dtype='f4', mode='w+', shape=(100, 100)); m[:] = 1; m.flush()
float(np.memmap('m.bin', dtype='f4', mode='r').sum()) == 10000, True""",
    "archives and temporary files": """
import os, shutil, tempfile, zipfile
with tempfile.TemporaryDirectory() as folder:
    open(f'{folder}/x', 'w').write('x'); os.chmod(f'{folder}/x', 0o600); os.utime(f'{folder}/x')
    shutil.copytree(folder, f'{folder}-copy'); shutil.make_archive('packed', 'zip', folder)
zipfile.ZipFile('packed.zip').namelist() == ['x'], True""",
    "alarms": """
import signal, time
def stop(*_): raise TimeoutError
signal.signal(signal.SIGALRM, stop); signal.setitimer(signal.ITIMER_REAL, 0.01)
try: time.sleep(10); slept = True
except TimeoutError: slept = False
not slept, True""",
    "calls back from C": """
import ctypes
kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
sum(kind(lambda x, i=i: x + i)(1) for i in range(100)) == 5050, True""",
    "time zones and the machine": """
import datetime, os, platform, time, zoneinfo
zone = datetime.datetime(2024, 7, 1, tzinfo=zoneinfo.ZoneInfo('Europe/Paris')).utcoffset().seconds == 7200
zone, os.cpu_count() > 0 and bool(platform.platform()) and time.process_time() > 0""",
}
WITH_PACKAGES = {
    "pandas": """
import pandas
frame = pandas.DataFrame({'name': list('abab'), 'size': range(4)}); frame.to_csv('frame.csv')
pandas.read_csv('frame.csv').groupby('name')['size'].mean().to_dict() == {'a': 1, 'b': 2}, True""",
    "matplotlib": """
import matplotlib.pyplot as plt
plt.plot([1, 3, 2]); plt.title('a plot'); plt.savefig('plot.png'); plt.savefig('plot.pdf')
open('plot.png', 'rb').read(4) == b'\\x89PNG', open('plot.pdf', 'rb').read(4) == b'%PDF'""",
    "sympy": """
import sympy
x = sympy.Symbol('x')
sympy.integrate(sympy.sin(x) ** 2, (x, 0, sympy.pi)) == sympy.pi / 2, len(sympy.solve(x**3 - 1)) == 3""",
}


@pytest.mark.parametrize("cell", CELLS)
def test_works(tool: PythonTool, cell: str) -> None:
    assert tool.run(CELLS[cell]) == "(True, True)\n"


@pytest.mark.parametrize("package", WITH_PACKAGES)
def test_works_with(tool: PythonTool, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    assert tool.run(WITH_PACKAGES[package]).strip().endswith("(True, True)")


@pytest.mark.parametrize(
    ("module", "pattern"), [("test_json", "*"), ("test_re", "*"), ("test_datetime", "*TestDateTime_Fast*")]
)
def test_the_standard_librarys_own_tests_pass(tool: PythonTool, module: str, pattern: str) -> None:
    """But those that start another process, which is refused."""
    if importlib.util.find_spec(f"test.{module}") is None:
        pytest.skip(f"Python {sys.version_info[0]} came without its tests")
    code = f"""
import io, unittest, test.support
test.support.has_subprocess_support = False
loader = unittest.TestLoader()
loader.testNamePatterns = [{pattern!r}]
done = unittest.TextTestRunner(io.StringIO()).run(loader.loadTestsFromName('test.{module}'))
print(done.testsRun > 50, [(str(test), text) for test, text in done.errors + done.failures
    if 'PermissionError: [Errno 1]' not in text])"""
    assert tool.run(code) == "True []\n"
