"""Sentences written for the tests, with the phrases that the default parser finds in them: all are right."""

from __future__ import annotations

SENTENCES: dict[str, str] = {
    "A brown dog sleeps on a red sofa.": "dog; sofa; dog | brown; sofa | red; dog | sleep on | sofa",
    "Two dogs chase a small ball on the beach.": (
        "dog; ball; beach; dog | two; ball | small; dog | chase | ball; ball | on | beach"
    ),
    "A man is holding a large umbrella.": "man; umbrella; umbrella | large; man | hold | umbrella",
    "The boy's bicycle is green.": "boy; bicycle; bicycle | green; boy | have | bicycle",
    "A woman brushes her long hair in front of a mirror.": (
        "woman; hair; front; mirror; hair | long; woman | brush | hair; "
        "woman | brush in front of | mirror; woman | have | hair"
    ),
    "A vase filled with yellow flowers stands on top of a piano.": (
        "vase; flower; top; piano; flower | yellow; vase | fill with | flower; vase | stand on top of | piano"
    ),
    "A baseball player swings a wooden bat.": "bat; player | baseball; bat | wooden; player | swing | bat",
    "A cat and a dog are sleeping next to a fireplace.": (
        "cat; dog; fireplace; cat | sleep next to | fireplace; dog | sleep next to | fireplace"
    ),
    "A cake is being cut by a young chef.": "cake; chef; chef | young; chef | cut | cake",
    "A girl who is wearing a blue dress feeds a horse.": (
        "girl; dress; horse; dress | blue; girl | wear | dress; girl | feed | horse"
    ),
    "Three white sheep are grazing in a field near a fence.": (
        "sheep; field; fence; sheep | three; sheep | white; sheep | graze in | field; sheep | graze near | fence"
    ),
    "There is a pizza on the wooden table.": "pizza; table; table | wooden; pizza | on | table",
    "An old man rides a bike down the street.": (
        "man; bike; street; man | old; man | ride | bike; man | ride down | street"
    ),
    "A couple of children play with a kite.": "couple; child; kite; child | a; child | play with | kite",
    "A black and white cat looks out of the window.": (
        "cat; window; cat | black; cat | white; cat | look out of | window"
    ),
    "A bowl of fruit sits beside a glass of milk.": (
        "bowl; fruit; glass; milk; bowl | of | fruit; bowl | sit beside | glass; glass | of | milk"
    ),
    "A bus parked in the middle of a road.": "bus; middle; road; bus | park in middle of | road",
    "The sky is cloudy.": "sky; sky | cloudy",
    "A bathroom with a sink and a mirror.": (
        "bathroom; sink; mirror; bathroom | with | sink; bathroom | with | mirror"
    ),
    "A surfer stands up on his board.": "surfer; board; surfer | stand up on | board; surfer | have | board",
    "A group of people are waiting for a train at the station.": (
        "group; people; train; station; group | of | people; group | wait for | train; train | at | station"
    ),
    "A plate covered with rice and beans.": ("plate; rice; bean; plate | cover with | rice; plate | cover with | bean"),
    "A clock tower on the side of a brick building.": (
        "side; tower | clock; building | brick; tower | on side of | building"
    ),
    "A mother holds her baby while cooking dinner.": (
        "mother; baby; dinner; mother | hold | baby; mother | have | baby"
    ),
    "A bird perched on a branch is singing.": "bird; branch; bird | sing; bird | perch on | branch",
    "Several boats float on the calm water.": "boat; water; boat | several; water | calm; boat | float on | water",
    "A train that has red doors leaves the station.": (
        "train; door; station; door | red; train | have | door; train | leave | station"
    ),
    "A person on skis jumps over a fence.": "person; ski; fence; person | on | ski; person | jump over | fence",
    "A bear is eating fish from a river.": "bear; fish; river; bear | eat | fish; bear | eat from | river",
    "A dog with a frisbee in its mouth runs through the grass.": (
        "dog; frisbee; mouth; grass; dog | with | frisbee; frisbee | in | mouth; "
        "dog | have | mouth; dog | run through | grass"
    ),
    "Four giraffes and two zebras drink water.": (
        "giraffe; zebra; water; giraffe | four; zebra | two; giraffe | drink | water; zebra | drink | water"
    ),
    "A lamp hangs above the kitchen table.": "lamp; table | kitchen; lamp | hang above | table",
    "A man wearing a hat and glasses reads a newspaper.": (
        "man; hat; glass; newspaper; man | wear | hat; man | wear | glass; man | read | newspaper"
    ),
    "A child sits between two teddy bears.": "child; bear | two; bear | teddy; child | sit between | bear",
    "A stop sign behind a parked car.": "car; sign | stop; car | park; sign | behind | car",
    "A kitchen with white cabinets and a stainless steel stove.": (
        "kitchen; cabinet; cabinet | white; steel | stainless; stove | steel; "
        "kitchen | with | cabinet; kitchen | with | stove"
    ),
    "The woman is surrounded by pigeons.": "woman; pigeon; pigeon | surround | woman",
    "A little girl blows out the candles on her birthday cake.": (
        "girl; candle; girl | little; cake | birthday; girl | blow out | candle; "
        "girl | blow out on | cake; girl | have | cake"
    ),
    "Oranges and apples in a basket.": "orange; apple; basket; orange | in | basket",
    "A motorcycle leaning against a stone wall.": "motorcycle; wall | stone; motorcycle | lean against | wall",
    "A lot of bananas hang from the ceiling.": "lot; banana; ceiling; banana | a; banana | hang from | ceiling",
    "Yellow buses stand outside of a station.": "bus; station; bus | yellow; bus | stand outside of | station",
}
