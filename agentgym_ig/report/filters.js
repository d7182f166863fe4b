"use strict";
/* Which episodes are listed. */

const OUTCOMES = [
  ["", "any"], ["won", "won"], ["lost", "lost"], ["near", "lost, some words right"], ["failed", "failed"],
];
const OUTCOMES_BESIDE = [
  ["won-lost", "won here, lost beside"], ["lost-won", "lost here, won beside"],
  ["won-won", "won in both"], ["lost-lost", "lost in both"],
];

const isNumber = (text) => text !== "" && Number.isFinite(Number(text));

/* The places of a run that pass all filters; `inTurns` is the result of a search in the turns, or null. */
function matching(run, beside, inTurns) {
  const tests = [];
  if (state.outcome) tests.push(outcomeTest(run, beside));
  if (state.dataset) tests.push((place) => questions.dataset[run.question[place]] === state.dataset);
  if (state.domain) tests.push((place) => data.domains[questions.dataset[run.question[place]]] === state.domain);
  if (state.stop) tests.push((place) => run.stop[place] === state.stop);
  if (isNumber(state.turnsMin)) tests.push((place) => run.turns[place] >= Number(state.turnsMin));
  if (isNumber(state.turnsMax)) tests.push((place) => run.turns[place] <= Number(state.turnsMax));
  if (state.channel) tests.push(channelTest(run.channels[state.channel] ?? []));
  const words = state.text.trim().toLowerCase();
  if (words) {
    const asked = textTest(run, words);
    tests.push((place) => asked(place) || (inTurns !== null && inTurns.has(place)));
  }
  const kept = [];
  for (let place = 0; place < run.question.length; place++) if (tests.every((test) => test(place))) kept.push(place);
  return kept;
}

function outcomeTest(run, beside) {
  const [here, there] = state.outcome.split("-");
  if (there) {
    return (place) => {
      const twin = beside && twinOf(run, place, beside);
      return twin !== undefined && verdictOf(run, place) === here && verdictOf(beside, twin) === there;
    };
  }
  if (here === "near") return (place) => verdictOf(run, place) === "lost" && run.f1[place] > 0;
  return (place) => verdictOf(run, place) === here;
}

/* Without bounds: that the episode has the channel at all. */
function channelTest(values) {
  const least = isNumber(state.channelMin) ? Number(state.channelMin) : -Infinity;
  const most = isNumber(state.channelMax) ? Number(state.channelMax) : Infinity;
  return (place) => values[place] !== null && values[place] !== undefined && values[place] >= least && values[place] <= most;
}

const haystacks = new Map();
function textTest(run, words) {
  if (!haystacks.has(run.label)) {
    haystacks.set(run.label, run.question.map((question, place) => [
      questions.text[question], ...questions.answers[question], run.answer[place] ?? "", nameOf(run, place),
    ].join("\n").toLowerCase()));
  }
  const texts = haystacks.get(run.label);
  return (place) => texts[place].includes(words);
}

/* Fill a select with [value, what is said] pairs, keeping what is chosen. */
function offer(id, options, chosen) {
  const select = byId(id);
  select.replaceChildren(...options.map(([value, said]) => {
    const option = el("option", {}, said);
    option.value = value;
    return option;
  }));
  select.value = options.some(([value]) => value === chosen) ? chosen : options[0]?.[0] ?? "";
  return select.value;
}

const spoken = (name) => name.replaceAll("_", " ");

const ALONE = "-";

/* The run that is shown beside another; of two, that is the other one until something else is chosen. */
function besideOf(run) {
  if (state.beside === ALONE) return undefined;
  const chosen = runNamed(state.beside);
  if (chosen && chosen !== run) return chosen;
  return data.runs.length === 2 ? data.runs.find((own) => own !== run) : undefined;
}

/* What can be chosen for the run that is shown. */
function offerFilters(run) {
  const labels = data.runs.map((own) => [own.label, own.label]);
  offer("run", labels, run.label);
  const beside = besideOf(run);
  offer("beside", [[ALONE, "nothing"], ...labels.filter(([label]) => label !== run.label)], beside?.label ?? ALONE);
  state.outcome = offer("outcome", beside ? [...OUTCOMES, ...OUTCOMES_BESIDE] : OUTCOMES, state.outcome);
  const datasets = new Set(run.question.map((question) => questions.dataset[question]));
  const known = Object.keys(data.domains).filter((name) => datasets.has(name));
  const domains = new Set(known.map((name) => data.domains[name]).filter(Boolean));
  state.dataset = offer("dataset", [["", "any"], ...known.map((name) => [name, name])], state.dataset);
  state.domain = offer("domain", [["", "any"], ...[...domains].map((name) => [name, name.replaceAll("_", "-")])], state.domain);
  state.stop = offer("stop", [["", "any way"], ...[...new Set(run.stop)].sort().map((name) => [name, spoken(name)])], state.stop);
  state.channel = offer("channel", [["", "any"], ...Object.keys(run.channels).map((name) => [name, spoken(name)])], state.channel);
  byId("run-field").hidden = byId("beside-field").hidden = data.runs.length < 2;
}
