// What you see: messages, notices, and who is online. Text is always `textContent`, never
// markup. The log grows from its end (`column-reverse` in chat.css): so the browser itself
// follows the newest message, and keeps your place when older ones are put in above.

import { limit } from "./connection.js";

export const find = (id) => document.getElementById(id);
export const { user } = document.querySelector(".room").dataset; // from an attribute: a translator may rewrite text
const log = find("log");
const messages = find("messages");
const older = find("older");

const SHOWN = 300; // newest lines in the list; "Older messages" brings the others
const TALL = /(.*\n){20}|[^]{2000}/; // a text that is folded
const GROUP = 5 * 60 * 1000; // longest pause within a group of messages, in milliseconds

let queue = []; // events that are not in the list: before `welcome`, and far below your place
let incomplete = false; // the queue has dropped its first events, so the list has a gap
let following = true; // whether the newest message is in sight
let place = {}; // above the end: the first line in sight, and how far it is from the top
let excess = 0; // how much higher the list was than the log, when they were last laid out
let unseen = 0; // messages that came while the page or its end was out of sight
let zone; // the time zone of all times that are shown
let loading = false; // older messages, one request at a time
const changed = []; // messages that an operator changed meanwhile
const pending = messages.getElementsByClassName("pending"); // yours without a number, at the end

// --- From an event to an item ---
function make(name, text = "", properties = {}) {
  return Object.assign(document.createElement(name), { textContent: text }, properties);
}

function makeMessage({ user: author, text, time, nonce }) {
  const item = make("li", "", { className: author === user ? "own" : "" });
  item.dataset.nonce = nonce;
  item.append(make("strong", author, { translate: false }), " ");
  item.append(make("time", "", { dateTime: time }), make("p"));
  setText(item, text);
  showTime(item);
  return item;
}

function setText(item, text) {
  const p = item.querySelector("p");
  const shown = text || "This message was removed.";
  item.classList.toggle("removed", !text);
  if (p.textContent !== shown) dress(item, shown);
}

// Items of the page itself come here as plain text, too: so all look the same.
function dress(item, text = item.querySelector("p").textContent) {
  const p = item.querySelector("p");
  p.replaceChildren(...split(text));
  if (!TALL.test(text)) p.closest("details")?.replaceWith(p);
  else if (!p.closest("details")) {
    const details = make("details");
    p.replaceWith(details);
    details.append(make("summary", "Whole text"), p);
  }
}

// Characters that end a web address: brackets, quotes, spaces, controls, typographic and
// East Asian punctuation. Brackets may enclose a part. No two branches match the same
// character, so no text can make the expression backtrack exponentially.
const ENDS = String.raw`()\s\x00-\x20\x7f-\xa0\u2000-\u206f\u3000-\u303f\ufeff\uff01-\uff0f<>"\x60`;
const LINK = String.raw`[Hh]ttps?://(?:[^${ENDS}]|\([^${ENDS}]*\))+(?<![.,:;!?'*_~|\]»])`;
const CODE = String.raw`^\x60{3}.*\n[^]*?^\x60{3}$\n?|^(?: {4}|\t).*(?:\n(?: {4}|\t).*)*\n?`;
const WORD = String.raw`[\p{L}\p{M}\p{N}_\-]`;
const NAME = `(?<!${WORD})@?${user.replaceAll("-", String.raw`\x2d`)}(?!${WORD}|@)`; // no address
const PARTS = new RegExp(`(${CODE})|(${LINK})|(${NAME})`, "gimu");
// `dir` sets a link apart: a character before it could turn it into another address.
const rel = "noopener noreferrer nofollow";
const MAKERS = [
  (text) => text, // between the parts
  (code) => make("code", code, { translate: false }),
  (href) => make("a", href, { href, rel, target: "_blank", dir: "ltr" }),
  (name) => make("mark", name, { translate: false }),
];
const split = (text) => text.split(PARTS).map((part, n) => (part ? MAKERS[n % 4](part) : ""));

// --- Times: a line with the day stands above the clock times of its messages ---
const timeOf = (item) => new Date(item.querySelector("time").dateTime);
const dayOf = (item) => timeOf(item).toDateString();
const authorOf = (item) => item.querySelector("strong").textContent;

function showTime(item) {
  const element = item.querySelector("time");
  const clock = timeOf(item).toLocaleTimeString([], { timeStyle: "short" });
  if (element.textContent !== clock) element.textContent = clock; // or it would be spoken again
  element.title = timeOf(item).toLocaleString([], { dateStyle: "full", timeStyle: "medium" });
}

// Put a message below the line of its day, and into the group of its author, who is named
// once. Call it also when something else stands above the message now.
function arrange(item) {
  if (!item?.dataset.nonce) return;
  if (item.previousElementSibling?.matches(".day")) item.previousElementSibling.remove();
  const above = item.previousElementSibling;
  let before = above; // the message before this one
  while (before && !before.dataset.nonce) before = before.previousElementSibling;
  const isSameDay = Boolean(before) && dayOf(before) === dayOf(item);
  const isNear = isSameDay && before === above && timeOf(item) - timeOf(before) < GROUP;
  item.classList.toggle("same", isNear && authorOf(before) === authorOf(item));
  if (isSameDay || !item.dataset.id) return;
  const day = timeOf(item).toLocaleDateString([], { dateStyle: "full" });
  item.before(make("li", day, { className: "day", ariaLive: "off" }));
}

function present(item) {
  dress(item);
  showTime(item);
  arrange(item);
}

// Present all again when you have travelled: two zones in one list would be a lie.
function checkZone() {
  const now = new Date().getTimezoneOffset();
  if (now !== zone) quietly(() => messages.querySelectorAll("[data-nonce]").forEach(present));
  zone = now;
}

// Screen readers don't speak a busy region. End with a timer: a hidden page has no frames.
function quietly(change) {
  log.ariaBusy = "true";
  change();
  setTimeout(() => { log.ariaBusy = "false"; }, 100);
}

// --- Adding to the end ---
const isNews = ({ type, user: author, text }) => type === "message" && author !== user && text;
const findPending = (nonce) => [...pending].find((item) => item.dataset.nonce === nonce);

// Before `welcome` only collect: all that was missed is shown in one layout. The queue has
// a bound, too: of a long absence, keep the newest.
export function show(event, live) {
  if (event.type !== "message") move(event);
  if (isNews(event) && (document.hidden || !following)) showUnseen(unseen + 1);
  queue.push(event);
  incomplete ||= queue.length > 2 * SHOWN;
  queue = queue.slice(-2 * SHOWN);
  if (live) flush();
}

// While you read far above, a further message costs no more than its count.
export function flush() {
  if (!following && (incomplete || messages.children.length > 2 * SHOWN)) return;
  if (incomplete) messages.replaceChildren(...pending);
  incomplete = false;
  checkZone();
  const events = queue.splice(0);
  const add = () => events.forEach((event) => (event.type === "message" ? append : note)(event));
  if (events.length > 3) quietly(add); // after a pause: too many to be spoken
  else add();
  trim();
}

// Your own message becomes the item that waited for it. Usually only attributes change, so
// a screen reader speaks it once.
function append(event) {
  let item = event.user === user && findPending(event.nonce);
  if (item) {
    item.classList.remove("pending");
    item.querySelector("time").dateTime = event.time;
    showTime(item);
    setText(item, event.text); // the server may have changed it
  } else {
    item = makeMessage(event);
    messages.insertBefore(item, pending[0]);
  }
  item.dataset.id = event.id;
  arrange(item);
  arrange(pending[0]);
}

// Joins and leaves that follow each other share one line. Each name is an element of its
// own: a right-to-left one must not move the words around it.
function note({ type, user: name }) {
  let line = pending[0] ? pending[0].previousElementSibling : messages.lastElementChild;
  if (!line?.people) {
    line = make("li", "", { className: "notice", translate: false });
    Object.assign(line, { ariaLive: "off", people: new Map() }); // not spoken
    messages.insertBefore(line, pending[0]);
    arrange(pending[0]);
  }
  line.people.delete(name); // each person's latest counts, and stands last
  line.people.set(name, type);
  const told = [...line.people].slice(-4);
  const others = line.people.size - told.length;
  const parts = told.flatMap(([person, what]) => [" · ", make("bdi", person), ` ${what}`]);
  line.replaceChildren(...(others ? [`${others} others came or left`, ...parts] : parts.slice(1)));
}

// Trim in steps: removing lines at the top moves all the others.
function trim() {
  const surplus = messages.children.length - pending.length - SHOWN;
  if (!following || loading || surplus < SHOWN / 6) return; // loading: it ends at the first item
  [...messages.children].slice(0, surplus).forEach((line) => line.remove());
  arrange(messages.querySelector("[data-id]"));
  offerOlder();
}

// --- What you sent, until it has its number ---
export function showPending({ nonce, text }) {
  showEnd(); // what came before it stands above it
  const item = makeMessage({ user, text, time: new Date().toISOString(), nonce });
  item.classList.add("pending");
  messages.append(item);
  arrange(item);
}

export const forget = (nonce) => findPending(nonce)?.remove();

// --- A number that is known: an operator may have changed the text ---
// Return false if it is another message: then the database was replaced.
export function update({ id, nonce, text }) {
  if (loading) changed.push({ id, nonce, text }); // its item may be on its way
  const event = queue.find((other) => other.id === id);
  if (event) event.text = text;
  const item = messages.querySelector(`[data-id="${id}"]`);
  if (item && item.dataset.nonce !== nonce) return false;
  if (item) setText(item, text);
  return true;
}

// --- Your place in the log: at its end, or where you read above ---
const topOf = (element) => element.getBoundingClientRect().top;
const heightOf = (element) => element.getBoundingClientRect().height;

const hold = (line) => { place = { line, top: line && topOf(line) - topOf(log) }; };

// A scroll event may come after a message, or a new size of the window, and before the
// layout is settled: then `grown` says how far that has moved the lines already.
function remember() {
  following = log.scrollTop > -5; // within 5 pixels: browsers round
  if (following) return showEnd();
  const grown = excess && heightOf(messages) - heightOf(log) - excess; // 0: no layout yet
  const top = topOf(log) - grown;
  const lines = [...messages.querySelectorAll(":scope > :not(.day)")];
  hold(lines.find((line) => topOf(line) + heightOf(line) > top));
  place.top += grown;
}

// When a height has changed, the browser calls this before it paints.
function settle() {
  excess = heightOf(messages) - heightOf(log);
  const moved = place.line?.isConnected ? topOf(place.line) - topOf(log) - place.top : 0;
  if (!following) log.scrollTop += moved;
}

export function showEnd() {
  following = true;
  flush();
  log.scrollTop = 0;
  showUnseen(0);
}

// What you unfold stays where it is, and grows downwards.
function holdFolded({ target }) {
  if (!target.matches("summary")) return;
  following = false;
  hold(target.closest("li"));
}

function showUnseen(count) {
  unseen = count;
  find("new").hidden = !count;
  find("new").textContent = count === 1 ? "1 new message" : `${count} new messages`;
  document.title = count ? `(${count}) Chat` : "Chat";
}

// --- The start of the list: older messages ---
function offerOlder() {
  const first = Number(messages.querySelector("[data-id]")?.dataset.id ?? 1);
  older.parentElement.hidden = first <= 1;
  older.search = `?before=${first}`;
  find("older-note").textContent = "";
}

async function showOlder(click) {
  if (click.ctrlKey || click.metaKey || click.shiftKey) return; // in a tab of its own
  click.preventDefault();
  if (loading) return;
  loading = true;
  older.textContent = "Loading …";
  offerOlder();
  const items = await loadOlder().catch(() => null);
  const focused = document.activeElement === older;
  if (items?.length) quietly(() => prepend(items));
  if (items?.length === 0) older.parentElement.hidden = true;
  if (!items?.length) find("older-note").textContent = items ? GONE : FAILED;
  if (focused && older.parentElement.hidden) log.focus(); // it would be lost with the link
  loading = false;
  older.textContent = "Older messages";
  changed.splice(0).forEach(update);
}

const GONE = "Older messages are not kept.";
const FAILED = "The older messages could not be loaded. Try again in a moment.";

// Believe the chat's own page only: a proxy may answer in its place.
async function loadOlder() {
  const answer = await fetch(older.href, { signal: AbortSignal.timeout(limit("answer")) });
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  if (page.querySelector(".room").dataset.user !== user) throw new Error("another user's page");
  return page.querySelectorAll("[data-id]");
}

function prepend(items) {
  settle(); // what has come below moves your place; what is put in here does not
  const former = messages.querySelector("[data-id]");
  messages.prepend(...items);
  items.forEach(present);
  arrange(former);
  offerOlder();
  settle();
}

// --- Who is online: one name in or out moves one item ---
const { compare } = new Intl.Collator("en");
const online = find("online");
const makeName = (name) => make("li", name, { translate: false });

export function showOnline(names) {
  online.replaceChildren(...[...names].sort(compare).map(makeName));
  find("count").textContent = names.length || "";
}

function move({ type, user: name }) {
  const next = [...online.children].find((item) => compare(item.textContent, name) >= 0);
  const isThere = next?.textContent === name;
  if (type === "left" && isThere) next.remove();
  if (type === "joined" && !isThere) online.insertBefore(makeName(name), next);
  find("count").textContent = online.children.length;
}

// --- Wiring ---
older.addEventListener("click", showOlder);
messages.addEventListener("click", holdFolded);
find("new").addEventListener("click", () => {
  showEnd();
  find("text").focus(); // the button is gone, so the focus would be lost
});
log.addEventListener("scroll", remember);
const heights = new ResizeObserver(settle);
heights.observe(log);
heights.observe(messages);
document.addEventListener("visibilitychange", () => {
  checkZone();
  if (!document.hidden && following) showUnseen(0);
});
checkZone();
