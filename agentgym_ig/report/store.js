"use strict";
/* The episodes: a light table of all of them, and compressed blocks that are unpacked when they are needed. */

const data = JSON.parse(byId("data").textContent);
const questions = data.questions;
const unpacked = new Map();
const KEPT = 40; // unpacked blocks

async function unpack(id) {
  if (!unpacked.has(id)) {
    const bytes = Uint8Array.from(atob(byId(id).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    unpacked.set(id, new Response(stream).json());
    if (unpacked.size > KEPT) unpacked.delete(unpacked.keys().next().value);
  }
  return unpacked.get(id);
}

/* The turns of an episode, with the texts that several blocks share put in. */
async function detailsOf(run, place) {
  const block = await unpack(`episodes-${run.block + Math.floor(place / data.blockSize)}`);
  return withTexts(block[place % data.blockSize]);
}

async function withTexts(details) {
  const turns = await Promise.all(details.turns.map(async (turn) => {
    if (!turn.texts) return turn;
    return {...turn, texts: await Promise.all(turn.texts.map(sharedText))};
  }));
  return {...details, turns};
}

async function sharedText(text) {
  if (typeof text === "string") return text;
  const block = await unpack(`texts-${Math.floor(text / data.textsPerBlock)}`);
  return block[text % data.textsPerBlock];
}

/* Which episodes of a run hold the words anywhere in their turns; `progress` is told the share that is done. */
async function searchTurns(run, words, progress, stopped) {
  const found = new Set();
  const shared = new Map();
  for (let first = 0; first < run.question.length; first += data.blockSize) {
    const block = await unpack(`episodes-${run.block + first / data.blockSize}`);
    for (const [row, details] of block.entries()) {
      if (await holds(details, words, shared)) found.add(first + row);
    }
    if (stopped()) return null;
    progress(Math.min(1, (first + data.blockSize) / run.question.length));
  }
  return found;
}

/* Shared texts are remembered as whether they hold the words, not as themselves: there are many. */
async function holds(details, words, shared) {
  for (const turn of details.turns) {
    const own = turn.pieces.map(([, text]) => text).join("") + "\n" + (turn.reply ?? "");
    if (own.toLowerCase().includes(words)) return true;
    for (const text of turn.texts ?? []) {
      if (typeof text === "string") {
        if (text.toLowerCase().includes(words)) return true;
        continue;
      }
      const number = Math.floor(text / data.textsPerBlock);
      if (!shared.has(number)) {
        const block = await unpack(`texts-${number}`);
        shared.set(number, block.map((each) => each.toLowerCase().includes(words)));
      }
      if (shared.get(number)[text % data.textsPerBlock]) return true;
    }
  }
  return false;
}

const runNamed = (label) => data.runs.find((run) => run.label === label);

/* The name of an episode in addresses: its question, and which try at it it was. */
function nameOf(run, place) {
  const question = run.question[place];
  const attempt = run.try[place];
  return `${questions.dataset[question]}/${questions.id[question]}` + (attempt > 1 ? `#${attempt}` : "");
}

const places = new Map();
function placesOf(run) {
  if (!places.has(run.label)) {
    places.set(run.label, new Map(run.question.map((_, place) => [nameOf(run, place), place])));
  }
  return places.get(run.label);
}

/* The same try at the same question in another run; undefined where there is none. */
const twinOf = (run, place, other) => placesOf(other).get(nameOf(run, place));

function verdictOf(run, place) {
  if (data.failed.includes(run.stop[place])) return "failed";
  return run.won[place] ? "won" : "lost";
}
