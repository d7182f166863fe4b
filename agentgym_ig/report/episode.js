"use strict";
/* One episode, or the same question in two runs, as a person reads it. */

const GAIN = "info_gain";
const SAID = {think: "thought", guide: "assessment", search: "search", tool_call: "search", answer: "answer", unread: "unreadable"};

/* A pattern for any of the answers, whatever case, spaces and punctuation they are written with; null if there is none.
   Yes and no would be found everywhere and mean nothing. */
function answerPattern(answers) {
  const patterns = [];
  for (const answer of answers) {
    const words = answer.match(/[\p{L}\p{N}\p{M}]+/gu) ?? [];
    if (!words.length || (words.length === 1 && /^(yes|no|true|false)$/i.test(words[0]))) continue;
    patterns.push(words.join("[^\\p{L}\\p{N}]{1,4}"));
  }
  if (!patterns.length) return null;
  patterns.sort((one, other) => other.length - one.length);
  return new RegExp(`(?<![\\p{L}\\p{N}])(?:${patterns.join("|")})(?![\\p{L}\\p{N}])`, "giu");
}

/* The text as nodes, with what the pattern finds marked. */
function marked(text, pattern) {
  if (!pattern) return [text];
  const nodes = [];
  let end = 0;
  for (const found of text.matchAll(pattern)) {
    nodes.push(text.slice(end, found.index), el("mark", {}, found[0]));
    end = found.index + found[0].length;
  }
  return [...nodes, text.slice(end)];
}

/* The whole reader: question, verdicts, and a column for each run. */
function readerOf(run, place, details, other) {
  const question = run.question[place];
  const answers = questions.answers[question];
  const dataset = questions.dataset[question];
  const [first, ...rest] = answers;
  const about = [dataset, (data.domains[dataset] ?? "").replaceAll("_", "-"), questions.id[question]];
  const shown = [{run, place, details}, ...(other ? [other] : [])];
  const gains = shown.flatMap((own) => (own.details?.turns ?? []).map((turn) => Math.abs(turn.rewards[GAIN] ?? 0)));
  const context = {
    pattern: answerPattern(answers), supporting: new Set(questions.supporting[question]), scale: Math.max(...gains, 0) || 1,
  };
  return [
    el("div", {class: "asking"},
      el("p", {class: "soft"}, about.filter(Boolean).join(" · ")),
      el("h2", {}, questions.text[question]),
      el("p", {class: "gold"}, el("span", {class: "soft"}, "gold answer "), el("b", {}, first ?? ""),
        rest.length ? el("details", {class: "also"}, el("summary", {}, `or ${rest.length} other${rest.length > 1 ? "s" : ""}`), rest.join(" · ")) : null)),
    el("div", {class: shown.length > 1 ? "columns two" : "columns"}, shown.map((own) => columnOf(own, context, shown.length > 1))),
  ];
}

function columnOf({run, place, details}, context, named) {
  if (place === undefined) return el("article", {}, el("h3", {}, run.label), el("p", {class: "soft"}, "No episode of this question in this run."));
  const verdict = verdictOf(run, place);
  const answer = run.answer[place];
  const failed = verdict === "failed";
  return el("article", {class: "episode"},
    named ? el("h3", {}, run.label) : null,
    el("p", {class: "outcome"}, el("span", {class: `pill ${verdict}`}, `${SIGNS[verdict]} ${verdict}`),
      answer === null ? el("span", {class: "soft"}, "no answer") : el("b", {class: "answer"}, answer),
      el("span", {class: "soft"}, `F1 ${percent(run.f1[place])} · ${spoken(run.stop[place])}`)),
    details.error ? el("p", {class: "fault"}, details.error) : null,
    failed ? el("p", {class: "soft"}, "It failed through no fault of the agent: updates leave it out.") : null,
    state.mask ? [el("p", {class: "soft legend"}, el("span", {class: "sampled"}, "the agent's own tokens"), " carry the loss; ",
      el("span", {class: "masked"}, "all else"), " is only read."), details.opening.map(([role, text]) => maskedText(role, text))]
      : el("details", {class: "prompt"}, el("summary", {}, "Prompt"), el("p", {class: "soft"}, `seed ${details.seed}`), details.opening.map(([role, text]) => [el("p", {class: "role soft"}, role), el("pre", {}, text)])),
    el("ol", {class: "turns"}, details.turns.map((turn, number) => turnOf(turn, number + 1, context))));
}

function turnOf(turn, number, context) {
  const body = state.mask ? maskOf(turn) : [actionOf(turn), replyOf(turn, context)];
  return el("li", {class: "turn", "aria-label": `turn ${number}`},
    el("div", {class: "turn-head"}, el("span", {class: "number"}, `turn ${number}`), rewardsOf(turn.rewards, context.scale)), body);
}

/* Thoughts, queries and the answer, without their tags. */
function actionOf(turn) {
  const parts = [];
  for (const [kind, text] of turn.pieces) {
    if (kind === "" || kind === "search" || kind === "tool_call" || !text.trim()) continue;
    parts.push(el("div", {class: `part ${kind}`}, el("span", {class: "label"}, SAID[kind] ?? kind), el("p", {}, text.trim())));
  }
  const asked = turn.pieces.filter(([kind]) => kind === "search" || kind === "tool_call").map(([, text]) => text.trim());
  for (const query of turn.queries.length ? turn.queries : asked) {
    parts.push(el("div", {class: "part search"}, el("span", {class: "label"}, turn.queries.length ? "search" : "not searched"), el("p", {}, query)));
  }
  if (turn.fault) parts.push(el("p", {class: "fault"}, turn.fault));
  return parts;
}

function replyOf(turn, context) {
  if (turn.reply) return el("div", {class: "part reply"}, el("span", {class: "label"}, "reply"), el("p", {}, marked(turn.reply.trim(), context.pattern)));
  if (!turn.texts) return null;
  return el("ol", {class: "passages"}, turn.texts.map((text, rank) => passageOf(text, turn.retrieved[rank], turn.ranked, context)));
}

/* A passage; a long one with nothing of note in it is folded to its beginning. */
function passageOf(text, id, ranked, {pattern, supporting}) {
  const colon = ranked ? text.indexOf(": ") : -1;
  const titled = colon > 0 && colon < 120;
  const content = [titled ? el("b", {}, marked(text.slice(0, colon), pattern)) : null, titled ? " " : null,
    marked(titled ? text.slice(colon + 2) : text, pattern)].flat();
  const holds = content.some((node) => node?.tagName === "MARK");
  const gold = supporting.has(id);
  const body = el("p", {class: "text"}, content);
  const folds = text.length > 280 && !holds && !gold;
  if (folds) body.classList.add("folded");
  const head = el("div", {class: "passage-head"}, el("span", {class: "soft"}, id),
    gold ? el("span", {class: "badge"}, "supporting") : null, holds ? el("span", {class: "badge has"}, "has the answer") : null,
    folds ? el("button", {type: "button", class: "quiet", "aria-expanded": "false", click: (event) => {
      const open = !body.classList.toggle("folded");
      event.target.setAttribute("aria-expanded", String(open));
      event.target.textContent = open ? "less" : "more";
    }}, "more") : null);
  return el("li", {class: gold ? "passage gold" : "passage"}, head, body);
}

function rewardsOf(rewards, scale) {
  const chips = Object.entries(rewards).filter(([name]) => name !== GAIN).map(([name, value]) =>
    el("span", {class: "chip"}, `${spoken(name)} `, el("b", {}, value === null ? "none" : String(Number(value.toFixed(3))))));
  return el("div", {class: "rewards"}, chips, GAIN in rewards ? gainOf(rewards[GAIN] ?? 0, scale) : null);
}

/* A bar from the middle, to the right for a gain and to the left for a loss; one scale for all turns shown. */
function gainOf(gain, scale) {
  const bar = el("span", {class: gain < 0 ? "bar down" : "bar up"});
  bar.style.width = `${Math.min(50, 50 * Math.abs(gain) / scale)}%`;
  const said = (gain < 0 ? "−" : "+") + Math.abs(gain).toFixed(2);
  return el("span", {class: "gain", title: "information gain: the change in the log-probability of the gold answer"},
    el("span", {class: "soft"}, "gain "), el("b", {}, said), el("span", {class: "track", "aria-hidden": "true"}, bar));
}

/* The exact text, with what the agent sampled set off from what it only read. */
function maskOf(turn) {
  const written = turn.pieces.map(([, text]) => text).join("");
  const tokens = turn.tokens ? `${turn.tokens} tokens, with loss` : "text alone was recorded, no tokens";
  let reply = turn.reply ?? "";
  if (turn.texts) {
    reply = turn.frame[0] + turn.texts.map((text, rank) => (turn.ranked ? `[${rank + 1}] ` : "") + text).join("\n") + turn.frame[1];
  }
  return [el("div", {class: "exact"}, el("span", {class: "label"}, `agent: ${tokens}`), el("pre", {class: "sampled"}, written)),
    reply ? maskedText("environment", reply) : null];
}

function maskedText(who, text) {
  return el("div", {class: "exact"}, el("span", {class: "label"}, `${who}: no loss`), el("pre", {class: "masked"}, text));
}
