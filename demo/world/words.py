"""Word pools of the demo world, and made-up words that no pool holds."""

from __future__ import annotations

import random


def words_of(text: str) -> list[str]:
    """The words of a text, separated by white space."""
    return text.split()


CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Iceland": "Reykjavik",
    "Ireland": "Dublin",
    "Poland": "Warsaw",
    "Austria": "Vienna",
    "Hungary": "Budapest",
    "Greece": "Athens",
    "Turkey": "Ankara",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Ghana": "Accra",
    "Nigeria": "Abuja",
    "Morocco": "Rabat",
    "Algeria": "Algiers",
    "Tunisia": "Tunis",
    "Ethiopia": "Addis Ababa",
    "Senegal": "Dakar",
    "Japan": "Tokyo",
    "China": "Beijing",
    "India": "New Delhi",
    "Nepal": "Kathmandu",
    "Thailand": "Bangkok",
    "Vietnam": "Hanoi",
    "Indonesia": "Jakarta",
    "Malaysia": "Kuala Lumpur",
    "Philippines": "Manila",
    "Mongolia": "Ulaanbaatar",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Jordan": "Amman",
    "Lebanon": "Beirut",
    "Russia": "Moscow",
    "Ukraine": "Kyiv",
    "Romania": "Bucharest",
    "Bulgaria": "Sofia",
    "Serbia": "Belgrade",
    "Croatia": "Zagreb",
    "Latvia": "Riga",
    "Estonia": "Tallinn",
    "Lithuania": "Vilnius",
    "Belgium": "Brussels",
    "Canada": "Ottawa",
    "Mexico": "Mexico City",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Chile": "Santiago",
    "Brazil": "Brasilia",
    "Argentina": "Buenos Aires",
    "Colombia": "Bogota",
    "Ecuador": "Quito",
    "Uruguay": "Montevideo",
    "Australia": "Canberra",
}
UNKNOWN_COUNTRIES = words_of(
    "Fiji Malta Cyprus Albania Armenia Bolivia Bhutan Brunei Chad Gabon Georgia Guatemala Haiti Honduras "
    "Jamaica Kazakhstan Kuwait Laos Libya Luxembourg Madagascar Mali Moldova Namibia Oman Panama Paraguay "
    "Qatar Rwanda Samoa Slovakia Slovenia Somalia Sudan Switzerland Syria Tanzania Togo Uganda Venezuela "
    "Yemen Zambia Zimbabwe Atlantis Narnia"
)
DAYS = words_of("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = {
    "January": 31,
    "February": 28,
    "March": 31,
    "April": 30,
    "May": 31,
    "June": 30,
    "July": 31,
    "August": 31,
    "September": 30,
    "October": 31,
    "November": 30,
    "December": 31,
}
NAMES = words_of(
    "Anna Tom Lena Max Emma Paul Nina Omar Sara Ivan Rosa Hugo Mia Leo Ella Noah Zoe Adam Eva Finn Maya "
    "Liam Olga Ravi Yuki Chen Amir Lucy Jack Alice Bob Carol Dave Eve Frank Grace Henry Iris James Kate "
    "Maria Peter Julia Mark"
)
THINGS = words_of(
    "apple pear fig plum cherry banana lemon mango grape melon orange kiwi peach strawberry tomato potato "
    "carrot onion cat dog horse cow bird fish mouse tiger lion bear wolf fox rabbit duck eagle whale "
    "shark frog snake goat red blue green yellow black white purple pink brown gray silver gold table "
    "chair lamp door window book pen pencil paper bottle cup plate spoon knife clock mirror bed shelf key "
    "coin car bus train plane boat bike truck river mountain forest ocean island desert garden bridge "
    "tower castle village sun moon star cloud rain snow wind storm stone sand water fire bread cheese "
    "butter honey sugar salt rice soup music dance story letter number word picture game ball toy hat "
    "coat shoe shirt sock glove ring bag box basket"
)
# The words whose letters the model knows.
SPELLED = words_of(
    "apple pear fig plum cherry banana lemon mango grape melon orange kiwi peach strawberry tomato potato "
    "carrot onion cat dog horse cow bird fish mouse tiger lion bear wolf fox rabbit duck car bus train plane "
    "boat bike truck"
)
ADJECTIVES = words_of(
    "big small old new fast slow warm cold happy quiet loud bright dark soft hard sweet tiny heavy"
)
JOBS = words_of("teacher doctor baker pilot farmer painter nurse singer driver writer cook lawyer")
PETS = words_of("cat dog horse rabbit parrot hamster turtle goldfish")
ATTRIBUTES = words_of(
    "weather price population height score owner status temperature color address rating time distance "
    "size weight age speed balance schedule menu capacity author title length depth area level location "
    "phone email birthday salary language currency forecast humidity stock version license mileage "
    "deadline budget altitude volume"
)
KINDS = words_of(
    "city country product person team room book song user server order account project device store hotel "
    "flight company street station planet animal car employee customer ticket"
)

_ONSETS = words_of("b c d f g h j k l m n p r s t v w z br cr dr fl gr kl pl sh st th tr")
_NUCLEI = words_of("a e i o u a e i o u ai ea oo")
_CODAS = ["", "", "", "", "n", "r", "s", "l", "m", "t", "k", "x", "nd", "rt"]


def made_up(rng: random.Random, syllables: int | None = None) -> str:
    """A pronounceable lower-case word of one to three syllables."""
    count = syllables or rng.choice((1, 2, 2, 2, 3))
    parts = [rng.choice(_ONSETS) + rng.choice(_NUCLEI) for _ in range(count)]
    return "".join(parts) + rng.choice(_CODAS)


def thing(rng: random.Random) -> str:
    """A common noun, now and then a made-up one."""
    return made_up(rng) if rng.random() < 0.15 else rng.choice(THINGS)


def proper(rng: random.Random) -> str:
    """A capitalised name: a city, a country, a person, or made up, of one or two words."""
    kind = rng.random()
    if kind < 0.3:
        return rng.choice(list(CAPITALS.values()))
    if kind < 0.4:
        return rng.choice(list(CAPITALS) + UNKNOWN_COUNTRIES)
    if kind < 0.55:
        return rng.choice(NAMES)
    if kind < 0.65:
        return rng.choice(THINGS).capitalize()
    if kind < 0.67:
        return f"{made_up(rng).capitalize()} {made_up(rng).capitalize()}"
    return made_up(rng).capitalize()
