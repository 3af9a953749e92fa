"""Facts with known answers, made for this project: subjects and answers by relation, and how each is asked.

Subjects stand roughly in the order in which one is likely to know them. Wordings end where the answer begins, and name
their subject once, never as their first word: the first token of a text is one that much attention goes to.
"""

from dataclasses import dataclass

CAPITALS = """
France: Paris; Germany: Berlin; Spain: Madrid; Italy: Rome; Japan: Tokyo; China: Beijing; Russia: Moscow;
the United Kingdom: London; Canada: Ottawa; Egypt: Cairo; Greece: Athens; India: New Delhi; Poland: Warsaw;
Sweden: Stockholm; Norway: Oslo; Ireland: Dublin; Austria: Vienna; Portugal: Lisbon; Turkey: Ankara; Cuba: Havana;
Peru: Lima; Iran: Tehran; Iraq: Baghdad; Thailand: Bangkok; Australia: Canberra; Argentina: Buenos Aires;
South Korea: Seoul; North Korea: Pyongyang; Denmark: Copenhagen; Finland: Helsinki; Hungary: Budapest;
the Netherlands: Amsterdam; Belgium: Brussels; Switzerland: Bern; Ukraine: Kyiv; the Czech Republic: Prague;
Romania: Bucharest; Bulgaria: Sofia; Serbia: Belgrade; Croatia: Zagreb; Syria: Damascus; Lebanon: Beirut;
Saudi Arabia: Riyadh; Afghanistan: Kabul; Pakistan: Islamabad; Bangladesh: Dhaka; Nepal: Kathmandu; Vietnam: Hanoi;
Indonesia: Jakarta; Malaysia: Kuala Lumpur; the Philippines: Manila; Kenya: Nairobi; Nigeria: Abuja; Ghana: Accra;
Ethiopia: Addis Ababa; Morocco: Rabat; Algeria: Algiers; Tunisia: Tunis; Libya: Tripoli; Sudan: Khartoum;
Somalia: Mogadishu; Uganda: Kampala; Zimbabwe: Harare; Zambia: Lusaka; Senegal: Dakar; Angola: Luanda;
Mozambique: Maputo; Brazil: Brasilia; Chile: Santiago; Colombia: Bogota; Venezuela: Caracas; Ecuador: Quito;
Uruguay: Montevideo; Paraguay: Asuncion; Jamaica: Kingston; Haiti: Port-au-Prince; the Bahamas: Nassau;
Iceland: Reykjavik; Estonia: Tallinn; Latvia: Riga; Lithuania: Vilnius; Slovakia: Bratislava; Slovenia: Ljubljana;
Albania: Tirana; Armenia: Yerevan; Azerbaijan: Baku; Georgia: Tbilisi; Kazakhstan: Astana; Uzbekistan: Tashkent;
Turkmenistan: Ashgabat; Mongolia: Ulaanbaatar; Belarus: Minsk; Moldova: Chisinau; Bosnia and Herzegovina: Sarajevo;
Montenegro: Podgorica; North Macedonia: Skopje; Cyprus: Nicosia; Malta: Valletta; Jordan: Amman; Qatar: Doha;
Oman: Muscat; Yemen: Sanaa; Bahrain: Manama; the United Arab Emirates: Abu Dhabi; Cambodia: Phnom Penh;
Laos: Vientiane; Fiji: Suva; New Zealand: Wellington; Rwanda: Kigali; Namibia: Windhoek; Botswana: Gaborone;
Madagascar: Antananarivo; Malawi: Lilongwe; Mali: Bamako; Niger: Niamey; Cameroon: Yaounde; Gabon: Libreville;
Liberia: Monrovia; Sierra Leone: Freetown; Guinea: Conakry; Burkina Faso: Ouagadougou; Togo: Lome; Eritrea: Asmara;
Mauritius: Port Louis; Honduras: Tegucigalpa; Nicaragua: Managua; Costa Rica: San Jose; Belize: Belmopan;
Suriname: Paramaribo; Guyana: Georgetown; Barbados: Bridgetown; Trinidad and Tobago: Port of Spain;
the Dominican Republic: Santo Domingo; Bhutan: Thimphu; Kyrgyzstan: Bishkek; Tajikistan: Dushanbe;
Papua New Guinea: Port Moresby
"""
LANGUAGES = """
France: French; Germany: German; Spain: Spanish; Italy: Italian; Japan: Japanese; China: Chinese; Russia: Russian;
Portugal: Portuguese; Greece: Greek; Mexico: Spanish; Turkey: Turkish; Poland: Polish; Brazil: Portuguese;
Sweden: Swedish; Egypt: Arabic; Norway: Norwegian; Australia: English; Denmark: Danish; Finland: Finnish;
Argentina: Spanish; Hungary: Hungarian; the Netherlands: Dutch; Austria: German; Saudi Arabia: Arabic; Iran: Persian;
Israel: Hebrew; Vietnam: Vietnamese; Colombia: Spanish; Thailand: Thai; South Korea: Korean; Iraq: Arabic;
Ukraine: Ukrainian; Cuba: Spanish; Romania: Romanian; Bulgaria: Bulgarian; New Zealand: English; Serbia: Serbian;
Chile: Spanish; Croatia: Croatian; Syria: Arabic; the Czech Republic: Czech; Peru: Spanish; Slovakia: Slovak;
Morocco: Arabic; Albania: Albanian; Jamaica: English; Armenia: Armenian; Venezuela: Spanish; Georgia: Georgian;
Algeria: Arabic; Iceland: Icelandic; Estonia: Estonian; Angola: Portuguese; Latvia: Latvian; Libya: Arabic;
Lithuania: Lithuanian; Uruguay: Spanish; Indonesia: Indonesian; Jordan: Arabic; Bangladesh: Bengali; Ecuador: Spanish;
Nepal: Nepali; Nigeria: English; Cambodia: Khmer; Mozambique: Portuguese; Mongolia: Mongolian; Senegal: French;
Tunisia: Arabic; Ghana: English; Monaco: French; Liechtenstein: German; Yemen: Arabic; the Ivory Coast: French
"""
OPPOSITES = """
hot: cold; good: bad; big: small; black: white; day: night; young: old; rich: poor; fast: slow; high: low; long: short;
happy: sad; light: dark; left: right; north: south; east: west; early: late; hard: soft; wet: dry; strong: weak;
true: false; full: empty; open: closed; love: hate; war: peace; life: death; male: female; inside: outside;
above: below; before: after; always: never; first: last; win: lose; buy: sell; push: pull; friend: enemy;
success: failure; heaven: hell; summer: winter; thick: thin; wide: narrow; deep: shallow; loud: quiet; clean: dirty;
cheap: expensive; easy: difficult; near: far; alive: dead; beautiful: ugly; positive: negative; maximum: minimum;
import: export; arrive: depart; begin: end; give: take; remember: forget; accept: reject; increase: decrease;
ancient: modern; public: private; guilty: innocent; smooth: rough; top: bottom; front: back; internal: external;
husband: wife; brother: sister; king: queen; odd: even; sunrise: sunset; victory: defeat; optimist: pessimist
"""
PLURALS = """
child: children; cat: cats; man: men; dog: dogs; woman: women; car: cars; mouse: mice; house: houses; foot: feet;
book: books; tooth: teeth; city: cities; person: people; baby: babies; goose: geese; box: boxes; leaf: leaves;
country: countries; knife: knives; story: stories; wife: wives; bus: buses; life: lives; church: churches;
wolf: wolves; dish: dishes; half: halves; potato: potatoes; shelf: shelves; tomato: tomatoes; thief: thieves;
hero: heroes; ox: oxen; boy: boys; cactus: cacti; key: keys; fungus: fungi; tree: trees; nucleus: nuclei;
apple: apples; analysis: analyses; bird: birds; crisis: crises; lady: ladies; phenomenon: phenomena; army: armies;
criterion: criteria; watch: watches; hypothesis: hypotheses; bacterium: bacteria; stimulus: stimuli; loaf: loaves
"""
COLOURS = """
grass: green; snow: white; blood: red; the sky: blue; coal: black; a banana: yellow; milk: white; a tomato: red;
a lemon: yellow; a leaf: green; a carrot: orange; chocolate: brown; a strawberry: red; the sun: yellow; a frog: green;
salt: white; a pumpkin: orange; the ocean: blue; a crow: black; a fire truck: red; sugar: white; a pig: pink;
a polar bear: white; spinach: green; a cherry: red; ink: black; a lime: green; ketchup: red; an elephant: gray;
mustard: yellow; a swan: white; a flamingo: pink; broccoli: green; a ruby: red; coffee: brown; a sapphire: blue;
an emerald: green; a rose: red; soil: brown; a raven: black; a cucumber: green; an eggplant: purple; flour: white;
a dandelion: yellow; a ladybug: red; charcoal: black; rice: white; lavender: purple; cotton: white; a stop sign: red;
ash: gray; a school bus: yellow; wood: brown; tar: black; a basketball: orange; a plum: purple; a grasshopper: green
"""


@dataclass(frozen=True)
class Relation:
    """A relation: subjects with their answers, and wordings, the first ones for tests, then validation and training."""

    known: dict[str, str]
    wordings: tuple[str, str, str, str, str]


def _table(text: str) -> dict[str, str]:
    rows = (each.split(":") for each in " ".join(text.split()).split(";"))
    return {subject.strip(): answer.strip() for subject, answer in rows}


RELATIONS = {
    "capitals": Relation(
        _table(CAPITALS),
        (
            "The capital of {subject} is",
            "The country is {subject}. Its capital is",
            "The capital city of {subject} is",
            "It is well known that the capital of {subject} is",
            "Name of country: {subject}. Name of its capital:",
        ),
    ),
    "languages": Relation(
        _table(LANGUAGES),
        (
            "The main language of {subject} is",
            "The country is {subject}. Its language is",
            "The official language of {subject} is",
            "People who live in {subject} mostly speak",
            "Name of country: {subject}. Name of its main language:",
        ),
    ),
    "opposites": Relation(
        _table(OPPOSITES),
        (
            "The opposite of {subject} is",
            "The exact opposite of {subject} is",
            "The antonym of {subject} is",
            "It is well known that the opposite of {subject} is",
            "Word: {subject}. Opposite:",
        ),
    ),
    "plurals": Relation(
        _table(PLURALS),
        (
            "I have one {subject} and you have two",
            "It is well known that the plural of {subject} is",
            "One {subject}, two",
            "The plural of {subject} is",
            "Singular: {subject}. Plural:",
        ),
    ),
    "colours": Relation(
        _table(COLOURS),
        (
            "The usual color of {subject} is",
            "Thing: {subject}. Color:",
            "Name of the thing: {subject}. Its usual color:",
            "Object: {subject}. Typical color:",
            "The color of {subject} is",
        ),
    ),
}
"""Relations by the name after `facts/`."""
N_OF_TEST = 3
"""Wordings of the test split; one each is of the others."""
