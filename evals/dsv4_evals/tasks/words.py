"""Words, numbers and identifiers that tasks plant: everyday English words, written down for this project.

Owns: the lists and how a unique key or value is drawn from them.  Knows no task and no tokenizer.  RULER draws its
words from the wonderwords package; only the lists differ here, not how they are used.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from functools import cache

from ..errors import TaskError

_ADJECTIVES = """
able absent active agile airy alert ample ancient angular antique ardent arid artful ashen astute autumn awake azure
balanced bare basic beaded bitter black blank blazing bleak blond blooming blue blunt bold bony bouncy brass brave
brief bright brisk bristly broad broken bronze brown bubbly bulky bumpy buoyant burly busy calm candid careful carved
casual cautious central charming cheap cheerful chewy chief chilly choppy chosen chubby circular civil classic clay
clean clear clever close cloudy clumsy coarse coastal cobalt cold colorful comic common compact complex constant cooked
cool copper coral cordial cosmic costly cozy cracked crafty creamy creative crimson crisp crooked crowded crude crunchy
crystal cubic curious curly current curved custom daily damp dapper daring dark dazzling dear deep delicate dense
diagonal digital dim direct distant dizzy docile domestic double doubtful drab dreamy dry dull dusky dusty dutiful
eager early earnest earthy eastern easy elastic elated elder electric elegant eligible emerald eminent empty endless
enormous equal essential eternal even exact exotic expert faded faint fair faithful famous fancy fast fearless feathery
festive fickle fierce final fine firm fiscal fitting flaky flat fleeting flexible floating floral fluent fluffy fluid
focal foggy fond foolish formal fragile fragrant frank free frequent fresh friendly frosty frozen frugal fruity full
fuzzy gallant gaunt gentle genuine giant gifted gilded glad gleaming global glossy golden graceful grainy grand granite
grassy grateful gray great green gritty groovy grown guarded gusty hairy half handsome handy happy hardy harsh hasty
hazel hazy heavy hefty helpful hidden high hilly hollow honest honored humble humid hungry hushed husky icy ideal idle
immense indigo inland inner intact ionic iron ivory jade jagged jaunty jolly jovial joyful juicy jumbo junior keen kind
knotted known lanky large lasting late lavish lazy leafy lean legal level light limber linear liquid little lively
local lofty lone long loose loud lovely loyal lucid lucky lunar lush magenta main major maple marble marine maroon
massive mature meager meek mellow merry messy metallic mild milky mint minor misty mobile modern modest moist molten
mossy muddy muffled mundane murky musical muted mystic narrow native neat nervous neutral new nimble noble nocturnal
noisy northern novel nutty oaken obtuse odd olive open orange orderly ornate outer oval pale paper parallel past pastel
patient peaceful pebbly perfect perky pink placid plain playful pleasant plucky plump plush polar polite porous potent
precise pretty prickly prime private prompt proper proud public puffy pure purple quaint quick quiet quirky rapid rare
ready real recent regal regular remote rich rigid ripe rising roaming robust rocky roomy rosy rotund rough round rowdy
royal rugged rural rustic rusty sable salty sandy satin savory scarce scarlet scenic secret sedate senior serene shady
shallow sharp sheer shiny short shy silent silky silver simple sincere sleek sleepy slender slick slim slow small smart
smoky smooth snappy snowy snug sober social soft solar solemn solid somber sonic sour southern spare sparse spicy
spiral splendid spotted square stable staid stark starry stately steady steep sterling stiff still stony stout strict
striped strong sturdy subtle sudden sugary sultry sunny superb supple sweet swift tactful talented tall tame tangy tart
tasty tawny teal tender tepid thick thin thorny thrifty tidal tidy timely tiny topical tough tranquil trim tropical
true trusty turquoise twin unique upbeat upper urban useful usual vacant vague valiant valid vast velvet verbal verdant
vibrant violet vital vivid vocal volcanic warm wary wavy waxen wealthy weary western whole wicker wide wild willing
windy winged wintry wiry wise witty wooden woolly worldly worthy woven yearly yellow young zany zealous
"""

_NOUNS = """
abbey acorn acrobat actor adapter admiral afternoon agate airport alarm album alcove alley alloy almanac almond
alphabet anchor anecdote ankle antelope antenna anvil apple apricot apron aquarium arcade arch archer arena armchair
armor arrow artist asphalt aster atlas attic auction author avenue aviator awning axle badge badger bagel bakery
balcony ballad ballot bamboo banana bandage banjo banner barber barley barn barometer barrel basil basin basket bassoon
battery bayou beach beacon beaker beard beaver bedroom beetle bell belt bench berry bicycle billboard birch biscuit
bison blanket blender blossom boat bobsled bonfire bonnet bookcase boot bottle boulder bouquet bowl bracelet branch
bread breeze brick bridge briefcase broccoli brook broom bucket buckle buffalo bugle bulb bundle bungalow bureau burrow
bus butter button cabbage cabin cable cactus cafe calendar camel camera campus canal candle cannon canoe canopy canvas
canyon caramel caravan cardigan cargo carnival carpenter carpet carriage carrot cartoon cashew castle catalog cathedral
cauldron cavern cedar ceiling celery cellar cello cement census ceramic chalk chamber channel chapel chapter chariot
charter chart cheese cherry chess chestnut chimney chisel choir cider cinema cinnamon circus citizen clamp clarinet
climate clinic cloak clock cloth clover coach cobbler coconut coffee collar college comet compass computer concert
condor cookie corn corridor cottage cotton couch council courier coyote cradle crane crater crayon cricket crow crown
cruiser crumb crystal cucumber cupboard curtain cushion cyclone cymbal cypress daffodil dagger dairy daisy dam dancer
dentist desert desk detective dewdrop diamond diary dictionary dinner dock doctor dolphin domino donkey doorway
dormouse dove drawer dresser drizzle drum duchess duck dune dungeon dynamo eagle easel echo eclipse editor eggplant
elbow elevator elk elm ember embassy emblem engine envelope equator errand escort essay estate evening falcon farm
farmer faucet feather fence fern ferry fiddle field figurine film finch finger fjord flag flame flannel flask fleet
flock flour flower flute folder forest forge fork fortress fossil fountain fox fraction frame freckle freezer frigate
frog frontier fungus furnace gadget galaxy gallery gallon garage garden garland garlic gazebo gazelle gear gecko geyser
giraffe glacier glass globe glove goblet goose gorge gourd grape grapefruit gravel greenhouse griffin grocery grotto
guitar gymnast hallway hammer hammock hamster handle harbor harness harp harvest hatchet hawk haystack hazelnut
headline heather hedge hedgehog helmet herald heron hickory highway hillside hinge hockey holiday honey horizon hornet
horse hospital hostel hotel hourglass iceberg icicle igloo iguana inkwell inn insect invoice island ivy jacket jackal
jaguar janitor jar jasmine jelly jewel jigsaw journal jug juggler jungle juniper kangaroo kayak kennel kernel kettle
keyboard kiln kimono kingdom kiosk kitchen kite kitten knapsack knight knuckle koala label ladder lagoon lake lamp
lantern lapel larch lark laundry lavender lawyer leaf ledger legend lemon lens leopard letter lettuce lever library
lighthouse lilac lily limestone linen lion lizard llama lobster locker locket locomotive lodge lotus lumber lunch lute
luggage lynx magnet magnolia magpie mailbox mallet mammoth mandolin mango mansion mantle map marathon margin marigold
market marmalade marsh mason mast mattress meadow medal melody melon merchant meteor meter microphone milestone mill
mineral mirror missile mitten moat model mole monarch monastery monsoon moon moose morning mosaic mosquito moth motor
mountain mouse movie muffin mulberry mural museum mushroom musket mustard napkin narrator nebula necklace needle nest
nettle newspaper nickel nightfall notebook novel nugget nurse nutmeg oak oasis oatmeal oboe ocean octopus office olive
omelet onion opal opera orbit orchard orchestra orchid organ origami ostrich otter outpost oven owl oyster package
paddle paddock pagoda pail palace palette pamphlet pancake panda panel panther papaya parade parcel park parrot parsley
passage pasta pastry pasture patio pavilion peach peacock peanut pear pebble pedal pelican pencil pendulum penguin
pepper perfume petal pharmacy pheasant piano picnic picture pigeon pillar pillow pilot pine pistachio pitcher planet
plank planter plateau platter plaza plum pocket poet poncho pond pony poplar poppy porcelain porch porridge port
postcard potato potter prairie printer prism professor propeller pudding puddle pulley pumpkin puppet puzzle pyramid
quail quarry quartz quilt rabbit raccoon radar radio radish raft railway rainbow raisin ranch raspberry raven razor
receipt recipe reef referee refuge relay reptile reservoir restaurant rhubarb ribbon rice ridge river roadside robin
rocket rooster rope rose rowboat ruby rudder ruler saddle saffron sailor salad salmon sandal sapphire sardine satchel
satellite sauna sausage saxophone scaffold scarf schooner scissors scooter scorpion sculptor seagull seashell season
senator sequoia settler shadow shampoo shark shawl shed shelter sheriff shovel shrimp shuttle sidewalk sieve signpost
singer siren skater sketch skillet skylark sled sleigh slipper sloop snail sofa soldier sonnet soup spaniel sparrow
spatula sphinx spider spinach sponge spoon spruce spur squash squid squirrel stable stadium stair stallion stapler
starfish station statue steamer stencil steward stirrup stove strawberry studio submarine suburb suitcase summit
sundial sunflower surgeon swallow swan sweater swimmer swing switch symphony syrup tablet tailor tangerine tapestry
tavern teacher teapot telescope temple tennis terrace theater thermos thicket thimble thistle thunder ticket tiger
timber toaster tomato topaz torch tornado tortoise towel tower tractor trail train trampoline treasure trellis tribune
trombone trophy trout trumpet tugboat tulip tundra tunnel turbine turkey turnip turtle tutor umbrella unicorn uniform
valley vanilla vase vault vehicle veranda vessel viaduct vicar village vine vineyard viola violin visitor voyage waffle
wagon waiter wallet walnut walrus wardrobe warehouse watch waterfall weasel weaver wharf wheel whisker whistle widow
willow window windmill winter wizard wolf wombat wood workshop wren wrench wrist yacht yard yarn yogurt zebra zephyr
zipper
"""

_VERBS = """
accept achieve acquire adapt admire admit adopt advise afford agree allow amuse analyze announce answer appear applaud
apply approve argue arise arrange arrive ascend ask assemble assist assume attach attend attract avoid await bake
bargain become beg begin behave believe belong bend blend bless blink boil borrow bounce bow breathe bring build
calculate carry cast catch celebrate change chase cheer choose clap climb coax collect combine compare compete complain
compose conceal conduct confess confirm connect consider construct consult contain continue contribute convince copy
correct count cover crawl create cross cry cure dance dare decide declare decorate defend define delay deliver depart
depend describe deserve design detect develop devote differ dig discover discuss dissolve dive divide donate doze drag
draw dream drift drink drive drop earn eat educate emerge employ enable encourage endure enjoy enlarge enter erase
escape evolve examine exceed exchange exclaim exist expand expect explain explore extend fasten feed fetch fetter fill
find finish fish flee float fly fold follow forbid forget forgive freeze frolic gather gaze generate give glide glow
grasp greet grow guess guide handle happen harvest hatch haul heal hear heat hesitate hide hike hope hover hum hurry
identify ignore imagine improve include increase inform inhabit inherit inspect inspire install invent invite itch join
jot judge juggle jump keep kneel knit knock know laugh launch lead leap learn leave lend lift linger listen loiter
lower manage march marvel measure meddle meet melt mend merge migrate mingle mumble murmur narrate navigate negotiate
nibble nod notice nudge obey observe obtain occur offer operate oppose order organize paint pardon participate pause
perceive perform permit persuade plant play plead please plunge polish ponder pour practice praise pray prefer prepare
prevent proceed produce promise propose protect prove provide publish pull punch pursue push question race raise reach
react read realize recall receive recite recognize recommend recover reduce reflect refuse rehearse rejoice relate
relax release rely remain remember remind remove repair repeat replace reply report request require rescue resemble
resist resolve respond restore retire return reveal reward ride roam roast roll sail scatter scratch scream scrub
search seek seize select send separate serve settle sew shake share shine shiver shout shrink sigh sing sip sit skip
sleep slide smile sneeze snore soar solve sort speak spend spin split spread sprinkle stand stare start stay steer
stretch stroll struggle study stumble succeed suggest supply support suppose surprise surround survive suspect sustain
sway swim swirl talk taste teach tear tease tell tend thank think thrive throw tickle tie toss touch trace trade
transform translate travel treat tremble trim trust try tumble turn twist understand unfold unite unload unlock untie
unwind uphold urge vanish venture visit wade wait wake walk wander wash water weave welcome wink wish wonder work worry
wrap write yawn yearn yell yield
"""


@cache
def adjectives() -> tuple[str, ...]:
    """Adjectives, sorted, each once."""
    return tuple(sorted(set(_ADJECTIVES.split())))


@cache
def nouns() -> tuple[str, ...]:
    """Nouns, sorted, each once."""
    return tuple(sorted(set(_NOUNS.split())))


@cache
def single_words() -> tuple[str, ...]:
    """All words, sorted, each once."""
    return tuple(sorted({*adjectives(), *nouns(), *_VERBS.split()}))


def number(rng: random.Random, digits: int = 7) -> str:
    """A number without a leading zero."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def word_pair(rng: random.Random) -> str:
    """ "brisk-lantern": RULER's form of a word key."""
    return f"{rng.choice(adjectives())}-{rng.choice(nouns())}"


def identifier(rng: random.Random) -> str:
    """A random UUID (version 4)."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def letters(rng: random.Random, length: int, alphabet: str) -> str:
    """Random letters."""
    return "".join(rng.choices(alphabet, k=length))


def unique(draw: Callable[[], str], count: int, taken: set[str] | None = None, plain: str = "") -> list[str]:
    """``count`` strings from ``draw`` that differ from each other and from ``taken`` (which grows by them).

    None of them occurs in ``plain``, the text in which they will be hidden.  Raises TaskError when there are hardly as
    many.
    """
    taken = set() if taken is None else taken
    found: list[str] = []
    misses = 0
    while len(found) < count:
        text = draw()
        if text in taken or text in plain:
            misses += 1
            if misses > 100 + 20 * count:
                raise TaskError(f"there are not {count:,} different names to plant", "Choose a shorter context.")
            continue
        taken.add(text)
        found.append(text)
    return found


def distinct_words(rng: random.Random, count: int) -> list[str]:
    """``count`` different words in random order: single ones while those last, "brisk-lantern" pairs among them after.

    Raises TaskError when there are fewer.
    """
    single = single_words()
    if count <= len(single):
        return rng.sample(single, count)
    pairs = unique(lambda: word_pair(rng), count - len(single))
    both = [*single, *pairs]
    rng.shuffle(both)
    return both
