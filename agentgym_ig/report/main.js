"use strict";
/* Puts the parts together: filters, list, reader, keyboard, address. */

const reader = byId("reader");
const list = new EpisodeList(byId("list"), byId("rows"), (place, read) => openEpisode(place, read));
const FIELDS = {
  text: "text", everywhere: "everywhere", run: "run", beside: "beside", outcome: "outcome", dataset: "dataset",
  domain: "domain", stop: "stop", "turns-min": "turnsMin", "turns-max": "turnsMax", channel: "channel",
  "channel-min": "channelMin", "channel-max": "channelMax",
};
const isNarrow = matchMedia("(max-width: 52rem)");
let shownRun, shownBeside, asked = 0, searched = {key: "", found: null}, searching = 0;

function start() {
  byId("to-overview").addEventListener("click", () => turnTo("overview"));
  reloadByItself();
  if (!data.runs.length) {
    document.querySelector(".skip").remove();
    return;
  }
  byId("to-episodes").hidden = false;
  byId("to-episodes").addEventListener("click", () => turnTo("episodes"));
  for (const button of document.querySelectorAll("button.example")) {
    button.addEventListener("click", () => {
      const run = data.runs[Number(button.dataset.run)];
      Object.assign(state, NOTHING, {view: "episodes", run: run.label, id: nameOf(run, Number(button.dataset.place))});
      writeAddress(true);
      showAll(true);
    });
  }
  for (const [id, name] of Object.entries(FIELDS)) {
    const field = byId(id);
    field.addEventListener(field.tagName === "SELECT" || field.type === "checkbox" ? "change" : "input", () => {
      state[name] = field.type === "checkbox" ? (field.checked ? "yes" : "") : field.value;
      showAll();
    });
  }
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("clear").addEventListener("click", () => {
    for (const name of FILTERS) state[name] = "";
    showAll();
  });
  byId("more").addEventListener("click", () => {
    const open = byId("filters").classList.toggle("open");
    byId("more").setAttribute("aria-expanded", String(open));
  });
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault();
    turnTo("episodes");
    list.box.focus();
  });
  document.addEventListener("keydown", onKey);
  addEventListener("hashchange", fromAddress);
  fromAddress();
}

/* A link to an episode leads to the episode, on a phone too. */
function fromAddress() {
  readAddress();
  showAll(state.id !== "");
}

function turnTo(view) {
  state.view = view;
  writeAddress(true);
  showAll();
}

/* Everything anew from the state. */
function showAll(read = false) {
  const episodes = state.view === "episodes" && data.runs.length > 0;
  byId("overview").hidden = episodes;
  byId("episodes").hidden = !episodes;
  byId("to-overview").setAttribute("aria-pressed", String(!episodes));
  byId("to-episodes").setAttribute("aria-pressed", String(episodes));
  document.body.classList.toggle("fixed", episodes);
  if (!episodes) return;
  shownRun = runNamed(state.run) ?? data.runs.at(-1);
  offerFilters(shownRun);
  shownBeside = besideOf(shownRun);
  for (const [id, name] of Object.entries(FIELDS)) {
    const field = byId(id);
    if (field.type === "checkbox") field.checked = state[name] !== "";
    else if (field.tagName !== "SELECT" && field.value !== state[name]) field.value = state[name];
  }
  const active = FILTERS.filter((name) => state[name] && name !== "text" && name !== "everywhere").length;
  byId("more").textContent = active ? `Filters (${active})` : "Filters";
  showList(read);
}

function showList(read) {
  const words = state.text.trim().toLowerCase();
  const key = state.everywhere && words.length > 1 ? `${shownRun.label}\n${words}` : "";
  if (key && key !== searched.key) {
    lookEverywhere(key, words);
    return;
  }
  if (!key) searching++;
  const found = matching(shownRun, shownBeside, key ? searched.found : null);
  const total = shownRun.question.length;
  const won = found.reduce((sum, place) => sum + shownRun.won[place], 0);
  const share = found.length ? `, ${(100 * won / found.length).toFixed(1)} % won` : "";
  byId("count").textContent = (found.length === total ? `${count(total)} episodes` : `${count(found.length)} of ${count(total)} episodes`) + share;
  const place = placesOf(shownRun).get(state.id);
  list.show(shownRun, shownBeside, found, place);
  if (place !== undefined && (list.current >= 0 || !filtered())) openEpisode(place, read);
  else if (found.length && !isNarrow.matches) list.choose(0);
  else closeEpisode(found.length ? "Choose an episode." : "No episode passes all filters.");
}

const count = (number) => number.toLocaleString("en");
const filtered = () => FILTERS.some((name) => state[name]);

async function lookEverywhere(key, words) {
  const own = ++searching;
  const stopped = () => own !== searching;
  await new Promise((later) => setTimeout(later, 250)); // until typing has paused
  if (stopped()) return;
  const progress = (share) => { byId("count").textContent = `searching the turns: ${percent(share)} %`; };
  const found = await searchTurns(shownRun, words, progress, stopped);
  if (found === null) return;
  searched = {key, found};
  showList();
}

async function openEpisode(place, read = false) {
  const own = ++asked;
  const run = shownRun, beside = shownBeside;
  state.id = nameOf(run, place);
  writeAddress(read && isNarrow.matches);
  document.body.classList.toggle("reading", read || (document.body.classList.contains("reading") && isNarrow.matches));
  let other = null;
  if (beside) other = {run: beside, place: twinOf(run, place, beside)};
  const details = await detailsOf(run, place);
  if (other && other.place !== undefined) other.details = await detailsOf(beside, other.place);
  if (own !== asked) return;
  reader.replaceChildren(toolbar(), ...readerOf(run, place, details, other));
  reader.scrollTop = 0;
  reader.dataset.id = state.id;
}

function toolbar() {
  const button = (said, click, more = {}) => el("button", {type: "button", click, ...more}, said);
  return el("div", {class: "toolbar"}, button("← List", () => { back(); }, {class: "back"}),
    button("Previous", () => list.move(-1)), button("Next", () => list.move(1)),
    button("Token mask", toggleMask, {"aria-pressed": String(state.mask !== ""), id: "mask"}));
}

function toggleMask() {
  state.mask = state.mask ? "" : "yes";
  const place = placesOf(shownRun).get(state.id);
  if (place === undefined) return;
  const focused = document.activeElement?.id === "mask";
  openEpisode(place, document.body.classList.contains("reading")).then(() => { if (focused) byId("mask").focus(); });
}

function closeEpisode(said) {
  asked++;
  state.id = "";
  writeAddress();
  document.body.classList.remove("reading");
  reader.replaceChildren(el("p", {class: "empty soft"}, said));
}

function back() {
  document.body.classList.remove("reading");
  list.draw();
  list.box.focus();
}

const MOVES = {
  j: () => list.move(1), k: () => list.move(-1),
};
const LIST_MOVES = {
  ArrowDown: () => list.move(1), ArrowUp: () => list.move(-1), PageDown: () => list.move(list.page), PageUp: () => list.move(-list.page),
  Home: () => list.choose(0), End: () => list.choose(list.places.length - 1),
  Enter: () => { if (list.current >= 0) { document.body.classList.add("reading"); reader.focus(); } },
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("episodes").hidden) return;
  const field = event.target.closest("input, select, textarea");
  if (event.key === "Escape") {
    if (field?.id === "text" && field.value) return; // the browser empties the field
    event.preventDefault();
    back();
  } else if (field) {
    if (field.id === "text" && (event.key === "Enter" || event.key === "ArrowDown")) {
      event.preventDefault();
      list.box.focus();
    }
  } else if (event.key === "/") {
    event.preventDefault();
    back();
    byId("text").focus();
    byId("text").select();
  } else if (event.key === "m") {
    toggleMask();
  } else if (MOVES[event.key]) {
    MOVES[event.key]();
  } else if (event.target === list.box && LIST_MOVES[event.key]) {
    event.preventDefault();
    LIST_MOVES[event.key]();
  }
}

/* The page of a run that goes on loads itself anew, but not under somebody who reads an episode. */
function reloadByItself() {
  const box = byId("reload");
  if (!box) return;
  try { box.checked = sessionStorage.getItem("reload") !== "off"; } catch { box.checked = true; }
  box.addEventListener("change", () => {
    try { sessionStorage.setItem("reload", box.checked ? "on" : "off"); } catch { /* then only for now */ }
  });
  setInterval(() => { if (box.checked && byId("episodes").hidden) location.reload(); }, 1000 * Number(box.dataset.seconds));
}

start();
