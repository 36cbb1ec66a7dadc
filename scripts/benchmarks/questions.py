"""Short instructions of different kinds, whose answers differ in length: prompts for natural stops."""

QUESTIONS = [
    "Name the three largest oceans of the world, and say in a few words how they differ from one another.",
    "I have eggs, spinach and a little cheese. What can I cook in ten minutes, and in which order?",
    "Write one friendly sentence that reminds a colleague of the meeting tomorrow morning at nine.",
    "Which is heavier, a kilogram of iron or a kilogram of feathers? Answer in one short sentence.",
    "Explain to a child of eight why the sky is blue during the day and red in the evening.",
    "Translate into French: the train leaves at noon. Give only the translation and nothing else.",
    "List four things that I should check before I leave for a long journey by car in winter.",
    "What is the capital of Norway, and roughly how many people live there? Keep it brief, please.",
    "Give me a title for a short story about a lighthouse keeper who collects other people's letters.",
    "My plant has yellow leaves and the soil is wet. What is most likely wrong, and what should I do?",
    "Put these words into alphabetical order and give back only the list: pear, apple, quince, fig.",
    "A shirt costs 40 euros and is reduced by a quarter. What do I pay now? Show the calculation.",
    "Describe the difference between weather and climate in two sentences that anyone would understand.",
    "Write a Python function that returns the larger of two numbers, without a comment or a test.",
    "Suggest a polite way of saying no to an invitation when I simply would rather stay at home.",
    "Is the word quickly a noun, a verb or an adverb? Answer with one word, then use it in a sentence.",
]
