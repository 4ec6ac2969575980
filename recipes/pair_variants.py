"""Records that the data lacks: system prompts, small talk, longer conversations, prompts without an answer.

All are made from training records (never held-out ones) or from the short lists below.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

NEUTRAL_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant. Answer as well as you can.",
    "You are a careful assistant who answers truthfully.",
    "You are an assistant that follows instructions exactly.",
    "Answer the user's question.",
    "Help the user with the task.",
    "You are a small language model. Do what the user asks.",
    "You answer questions of all kinds.",
    "You are an expert in many fields.",
    "Give a correct and clear answer.",
    "Be polite and helpful.",
    "Reply in a friendly tone.",
)
BRIEF_SYSTEM_PROMPTS = (
    "Be brief.",
    "Answer briefly.",
    "Answer in one sentence.",
    "Keep your answers short.",
    "You are a helpful assistant who gives short answers.",
    "Use one sentence at most.",
)
TRANSLATOR_SYSTEM_PROMPTS = (
    "You are a translator. Translate every message into {language}.",
    "Translate what the user writes to {language}.",
    "You translate to {language}. Reply with the translation only.",
    "You are a helpful assistant that translates into {language}.",
)
DICTIONARY_SYSTEM_PROMPTS = (
    "You are a dictionary. Define each word that the user sends.",
    "Explain the meaning of the user's word.",
    "The user sends a word; give its definition.",
)
CAPITALS_SYSTEM_PROMPTS = (
    "Answer in capital letters.",
    "Write your answer in capital letters only.",
    "Always reply in upper case.",
)
OPENINGS = ("Sure!", "Certainly.", "Of course!", "Gladly.", "Here you go:", "Yes!")
CLOSINGS = ("Have a nice day!", "I hope this helps.", "Anything else?", "Goodbye!")
NAMES = (
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Ella",
    "Felix",
    "Grace",
    "Hugo",
    "Ida",
    "Jonas",
    "Kim",
    "Leo",
    "Mia",
    "Noah",
    "Olga",
    "Paul",
    "Rosa",
    "Sam",
    "Tina",
    "Victor",
)
JOBS = (
    "a librarian",
    "a cook",
    "a teacher",
    "a doctor",
    "a gardener",
    "a tour guide",
    "a pilot",
    "a language teacher",
    "a museum guide",
    "a shop assistant",
    "a football coach",
)
SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi", "Hi! What can I do for you?"),
    ("Hi there!", "Hi there! How can I help?"),
    ("Good morning!", "Good morning! How can I help you today?"),
    ("Good evening.", "Good evening! What can I do for you?"),
    ("Hey, how is it going?", "I am fine, thank you. How are you?"),
    ("How are you doing?", "I am doing well, thank you. How can I help you?"),
    ("Thanks!", "You're welcome!"),
    ("Thank you very much.", "You're welcome! Let me know if you need anything else."),
    ("Thanks a lot for your help.", "You're welcome. I am glad I could help."),
    ("Bye!", "Goodbye! Have a nice day."),
    ("See you later.", "See you later!"),
    ("Good night.", "Good night! Sleep well."),
    ("Who are you?", "I am a small language model made for testing decoding methods."),
    (
        "What are you?",
        "I am a small language model. I can translate short sentences, do small sums and chat.",
    ),
    ("Are you a human?", "No, I am a small language model."),
    ("Are you a robot?", "I am a computer program, a small language model."),
    (
        "What can you do?",
        "I can translate short sentences, define words, do small sums and follow simple instructions.",
    ),
    ("Can you help me?", "Of course! What do you need?"),
    ("I need your help.", "I am happy to help. What do you need?"),
    ("Can I ask you something?", "Sure, go ahead."),
    ("I have a question.", "Go ahead, I am listening."),
    ("You are very helpful.", "Thank you! I am glad to hear that."),
    ("I am sad today.", "I am sorry to hear that. Do you want to talk about it?"),
    ("I am tired.", "Then you should take a rest. Did you sleep well?"),
    ("I am happy today!", "That is great! What happened?"),
    ("I am bored.", "Let's change that! You could read a book, take a walk or call a friend."),
    ("It is raining again.", "What a pity! It is a good day to stay at home with a book."),
    ("Nice to meet you.", "Nice to meet you, too!"),
    ("Sorry, I made a mistake.", "No problem, that happens to everyone."),
    ("What is the weather like?", "I am sorry, I cannot see the weather. Please look out of the window."),
    ("Can you speak German?", "A little. I can translate short sentences into German."),
    ("Can you speak French?", "A little. I can translate short sentences into French."),
    ("Which languages do you know?", "I know some English, German and French."),
    ("What are the primary colors?", "The primary colors are red, yellow and blue."),
    ("How many days are there in a week?", "There are seven days in a week."),
    ("How many months does a year have?", "A year has twelve months."),
    ("List three animals.", "1. Dog\n2. Horse\n3. Elephant"),
    ("Name four colors.", "Red, blue, green and yellow."),
    ("List five vegetables.", "1. Carrot\n2. Potato\n3. Onion\n4. Spinach\n5. Cucumber"),
    (
        "Give me two tips for sleeping better.",
        "1. Go to bed at the same time every day.\n2. Do not look at a screen before you go to sleep.",
    ),
    (
        "Give me three tips for saving money.",
        "1. Write down what you spend.\n2. Cook at home.\n3. Compare prices before you buy something.",
    ),
    (
        "How do I make tea?",
        "Boil some water, pour it over the tea and let it stand for about four minutes. "
        "Then take out the tea and enjoy.",
    ),
    ("Write a sentence about the sea.", "The sea was calm and blue in the morning light."),
    (
        "Write two sentences about a cat.",
        "The cat sleeps on the warm windowsill. In the evening it goes out to hunt mice.",
    ),
    (
        "Write a short poem about the moon.",
        "The moon is bright,\nit shines at night,\nand fills the sleeping town with light.",
    ),
    ("Tell me a joke.", "Why did the bicycle fall over? Because it was two tired."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("What do bees make?", "Bees make honey."),
    ("Is the sun a star?", "Yes, the sun is a star."),
)
NAME_QUESTIONS = ("What is your name?", "What's your name?", "Who are you?", "Tell me your name, please.")
SHORT_SOURCES = (
    "synthetic_tasks",
    "instruction_induction",
    "llms_from_scratch",
    "self_instruct_seed",
    "factbook",
    "wordnet",
    "mawps",
    "tatoeba_ende",
    "tatoeba_enfr",
    "wikisql",
    "tldr_pages",
)

_TRANSLATION = re.compile(
    r"^(?:Translate|How do you say|What does this mean)[^:?\n.]*?\b(?:to|in|into) "
    r"(English|German|French)(?:\.\n|[:?]\s)(.+)$",
    re.DOTALL,
)
_DEFINITION = re.compile(r'^(?:Define|What does|Explain) [^"]*"([^"]+)"')


def chat(*contents: str, system: str | None = None, source: str = "system_prompts") -> dict:
    """A record from alternating user and assistant turns."""
    turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(contents)]
    return {
        "messages": [{"role": "system", "content": system}] * (system is not None) + turns,
        "source": source,
    }


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[a-z)][.!?])\s+(?=[A-Z])|\n", text, maxsplit=1)[0]


def with_system_prompt(record: dict, rng: random.Random) -> dict | None:
    """One variant of a record that shows what a system prompt does, or None where none fits."""
    turns = [turn["content"] for turn in record["messages"]]
    if record["source"] in ("self_dialogue", "synthetic_persona_chat"):
        system = f"You are {rng.choice(NAMES)}. You are having a friendly conversation."
        return chat(*turns, system=system)
    if len(turns) != 2:
        return None
    question, answer = turns
    if record["source"].startswith("tatoeba") and (found := _TRANSLATION.match(question)):
        system = rng.choice(TRANSLATOR_SYSTEM_PROMPTS).format(language=found[1])
        return chat(found[2], answer, system=system)
    kinds = ["neutral"]
    if record["source"] == "wordnet" and (found := _DEFINITION.match(question)) and rng.random() < 0.5:
        return chat(found[1], answer, system=rng.choice(DICTIONARY_SYSTEM_PROMPTS))
    if len(first_sentence(answer)) + 20 < len(answer) and "```" not in answer and "\n1" not in answer:
        kinds += ["brief"] * 2
    if len(answer) < 100 and answer.isascii() and record["source"] in SHORT_SOURCES[:6]:
        kinds += ["capitals", "opening", "closing"]
    kind = rng.choice(kinds)
    if kind == "brief":
        return chat(question, first_sentence(answer), system=rng.choice(BRIEF_SYSTEM_PROMPTS))
    if kind == "capitals":
        return chat(question, answer.upper(), system=rng.choice(CAPITALS_SYSTEM_PROMPTS))
    if kind == "opening":
        words = rng.choice(OPENINGS)
        return chat(question, f"{words} {answer}", system=f'Begin every answer with "{words}"')
    if kind == "closing":
        words = rng.choice(CLOSINGS)
        return chat(question, f"{answer} {words}", system=f'End every answer with "{words}"')
    return chat(question, answer, system=rng.choice(NEUTRAL_SYSTEM_PROMPTS))


def made_records(records: list[dict], seed: int) -> Iterator[dict]:
    """Sources `system_prompts`, `small_talk` and `conversations`, made from the training records."""
    rng = random.Random(seed)
    for question, answer in SMALL_TALK:
        yield chat(question, answer, source="small_talk")
        yield chat(question, answer, system=rng.choice(NEUTRAL_SYSTEM_PROMPTS), source="small_talk")
    for name in NAMES:
        for job in rng.sample(JOBS, 4):
            asked = rng.choice(NAME_QUESTIONS)
            said = f"I am {name}, {job}." if asked == "Who are you?" else f"My name is {name}."
            hello = rng.choice(SMALL_TALK[:8])
            turns: tuple[str, ...] = (*hello, asked, said) if rng.random() < 0.5 else (asked, said)
            yield chat(*turns, system=f"You are {name}, {job}.", source="small_talk")
    chats = [record for record in records if "messages" in record]
    # Translations are half of all records; the others teach system prompts better.
    likely = {
        "tatoeba_ende": 0.03,
        "tatoeba_enfr": 0.03,
        "self_dialogue": 0.04,
        "tldr_pages": 0.04,
        "wikisql": 0.04,
    }
    for record in chats:
        if rng.random() < likely.get(record["source"], 0.15) and (made := with_system_prompt(record, rng)):
            yield made
    short = [record for record in chats if record["source"] in SHORT_SOURCES and len(str(record)) < 500]
    for _ in range(len(short) // 15):
        parts = rng.sample(short, rng.randint(2, 6)) if rng.random() < 0.9 else rng.sample(short, min(len(short), 20))
        joined = [turn["content"] for part in parts for turn in part["messages"][:2]]
        system = rng.choice(NEUTRAL_SYSTEM_PROMPTS) if rng.random() < 0.3 else None
        yield chat(*joined, system=system, source="conversations")


def open_prompts(records: list[dict], count: int, seed: int) -> Iterator[dict]:
    """Chat prompts with no reference answer, source `open_prompts`: sentences to translate, sums.

    The target answers them and the draft learns from that, so the draft sees more than the training answers.
    The last turn is an empty open assistant turn.
    """
    rng = random.Random(seed)
    talk = [record for record in records if record["source"] in ("self_dialogue", "synthetic_persona_chat")]
    talk = talk or [record for record in records if "messages" in record]
    for _ in range(count):
        if rng.random() < 0.2:
            low, high, sign = rng.choice(((1, 99, "+"), (1, 999, "+"), (1, 99, "-"), (1, 999, "-"), (2, 12, "x")))
            first, second = sorted((rng.randint(low, high), rng.randint(low, high)), reverse=True)
            form = rng.choice(("What is {} {} {}?", "Calculate {} {} {}.", "{} {} {} ="))
            prompt = form.format(first, sign, second)
        else:
            sentence = rng.choice(rng.choice(talk)["messages"])["content"]
            if not 12 <= len(sentence) <= 160:
                sentence = first_sentence(sentence)[:160]
            language = rng.choice(("German", "French"))
            form = rng.choice(
                (
                    "Translate English to {}: ",
                    "Translate to {}: ",
                    "How do you say this in {}? ",
                    "Translate the following sentence to {}.\n",
                    "Translate into {}: ",
                )
            )
            prompt = form.format(language) + sentence
        ask = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "", "open": True}]
        yield {"messages": ask, "source": "open_prompts"}
