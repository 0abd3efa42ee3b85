"""Units of quantities: which are known, and how one converts into another."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_TABLE = """
length   1e-9 nm nanometer nanometre
length   1e-6 um \u03bcm \u00b5m micron micrometer micrometre
length   1e-3 mm millimeter millimetre
length   1e-2 cm centimeter centimetre
length   1e-1 dm decimeter decimetre
length   1    m meter metre
length   1000 km kilometer kilometre
length   0.0254 in inch inches
length   0.3048 ft foot feet
length   0.9144 yd yard
length   1609.344 mi mile
mass     1e-6 mg milligram
mass     1e-3 g gram gramme
mass     1    kg kilogram kilo
mass     1000 tonne
mass     0.45359237 lb lbs pound
mass     0.028349523125 oz ounce
time     1e-3 ms millisecond
time     1    s sec second
time     60   min minute
time     3600 h hr hour
time     86400 day
time     604800 week
month    1    month
month    12   yr year
volume   1e-3 ml mL milliliter millilitre
volume   1    l L liter litre
volume   3.785411784 gallon gal
angle    1    \u00b0 deg degree
radian   1    rad radian
celsius  1    \u00b0C C celsius
fahrenheit 1  \u00b0F F fahrenheit
kelvin   1    K kelvin
percent  1    % percent pct percentage
dollar   1    $ usd dollar buck
dollar   1/100 cent \u00a2
euro     1    \u20ac eur euro
sterling 1    \u00a3 gbp
yen      1    jpy yen
yuan     1    cny rmb yuan
yen      1    \u00a5
rupee    1    \u20b9 inr rupee
pixel    1    px pixel
force    1    N newton
force    1000 kN
energy   1    J joule
energy   1000 kJ kilojoule
energy   3600000 kWh
energy   4.184 cal calorie
energy   4184 kcal
power    1    W watt
power    1000 kW kilowatt
pressure 1    Pa pascal
pressure 1000 kPa
charge   1    coulomb
current  1    A amp ampere
current  1e-3 mA
voltage  1    V volt
voltage  1e-3 mV
voltage  1000 kV
resistance 1  \u03a9 \u2126 ohm
frequency 1   Hz hertz
frequency 1000 kHz
frequency 1e6 MHz
frequency 1e9 GHz
amount   1    mol mole
data     1    byte
data     1000 kB KB
data     1e6  MB
data     1e9  GB
"""


@dataclass(frozen=True)
class Unit:
    """A known unit: how often each base dimension stands in it, and its size in base units."""

    dimensions: tuple[tuple[str, int], ...]
    size: Fraction

    @property
    def percent(self) -> bool:
        return self.dimensions == (("percent", 1),)


def _read_table() -> tuple[dict[str, Unit], dict[str, Unit]]:
    symbols: dict[str, Unit] = {}
    words: dict[str, Unit] = {}
    for line in _TABLE.strip().splitlines():
        dimension, size, *names = line.split()
        unit = Unit(((dimension, 1),), Fraction(size))
        for name in names:
            symbols[name] = unit
            if len(name) > 2 and name.isalpha():
                words[name] = words[name + "s"] = words[name + "es"] = unit
            if len(name) > 1 and name.islower():
                words[name] = unit
    return symbols, words


_SYMBOLS, _WORDS = _read_table()
_PART = r"[A-Za-z\u03bc\u00b5\u03a9\u2126\u00b0%$\u20ac\u00a3\u00a5\u00a2\u20b9]+"
_POWER = r"(?:\s?\^\s?\{?\s?(-?\d)\s?\}?)?"
_ONE = re.compile(rf"\s*((?:square|sq\.?|cubic|cu\.?)\s+)?(\u00b0\s?[CF](?![A-Za-z])|{_PART}){_POWER}(?:\.(?=\s*$))?")
_OVER = re.compile(r"\s*(?:/|\bper\b)\s*(?:an?\s+)?")
_TIMES = re.compile(r"\s*\*\s*")
_SUSPECT = frozenset(["in", "a", "A"])
"""Words of a sentence as well: units only where nothing follows."""


def read_unit(text: str, at: int) -> tuple[Unit, int] | None:
    """The known unit that begins at `at`, such as cm, m^2, km/h or degrees, and where it ends."""
    unit, end = _read_one(text, at) or (None, at)
    if unit is None:
        return None
    while over := _OVER.match(text, end) or _TIMES.match(text, end):
        more = _read_one(text, over.end())
        if more is None:
            break
        sign = 1 if "*" in over[0] else -1
        unit, end = _product(unit, _power(more[0], sign)), more[1]
    return unit, end


def _read_one(text: str, at: int) -> tuple[Unit, int] | None:
    found = _ONE.match(text, at)
    if found is None:
        return None
    name = found[2].replace(" ", "")
    unit = _SYMBOLS.get(name) or _WORDS.get(name.casefold())
    if unit is None and name.casefold() == "per" and text[found.end() :].lstrip()[:4] == "cent":
        return _SYMBOLS["%"], text.index("cent", found.end()) + 4
    if unit is None or (name in _SUSPECT and text[found.end() :].strip(" .)]}$")):
        return None
    power = int(found[3]) if found[3] else 1
    if found[1]:
        power = 2 if found[1].startswith("s") else 3
    return (_power(unit, power), found.end()) if power else None


def _power(unit: Unit, power: int) -> Unit:
    return Unit(tuple((name, n * power) for name, n in unit.dimensions), unit.size**power)


def _product(one: Unit, other: Unit) -> Unit:
    total = dict(one.dimensions)
    for name, n in other.dimensions:
        total[name] = total.get(name, 0) + n
    return Unit(tuple(sorted((name, n) for name, n in total.items() if n)), one.size * other.size)


_HOURLY = {"mph": "mi", "kmh": "km", "kph": "km", "kmph": "km"}
for _name, _length in _HOURLY.items():
    _SYMBOLS[_name] = _product(_SYMBOLS[_length], _power(_SYMBOLS["h"], -1))
