"use strict";
/* What is shown, kept in the address after "#", so that a link leads to the same place. */

const NOTHING = {
  view: "overview", run: "", beside: "", text: "", everywhere: "", outcome: "", dataset: "", domain: "", stop: "",
  turnsMin: "", turnsMax: "", channel: "", channelMin: "", channelMax: "", id: "", mask: "",
};
const FILTERS = ["text", "everywhere", "outcome", "dataset", "domain", "stop", "turnsMin", "turnsMax",
  "channel", "channelMin", "channelMax"];

const state = {...NOTHING};

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of Object.keys(NOTHING)) state[name] = given.get(name) ?? NOTHING[name];
  if (given.get("id") && !given.get("view")) state.view = "episodes";
}

/* keep: whether the browser's back button leads to what was shown before. */
function writeAddress(keep = false) {
  const shown = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) if (value !== NOTHING[name]) shown.set(name, value);
  const address = "#" + shown;
  if (address === (location.hash || "#")) return;
  if (keep) history.pushState(null, "", address);
  else history.replaceState(null, "", address);
}

/* An element with its attributes and children; strings become text and nothing else. */
function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

const byId = (id) => document.getElementById(id);
