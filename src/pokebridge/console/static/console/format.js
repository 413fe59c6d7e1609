// Numbers as people read them.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const clock = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });

export const formatCount = (number) => whole.format(number);

/** A rate: small ones with a decimal. */
export const formatRate = (perS) => (perS > 0 && perS < 10 ? perS.toFixed(1) : whole.format(perS));

export const formatShare = (share) => `${(share * 100).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;

export const formatMs = (ms) => (ms < 10 ? `${ms.toFixed(1)} ms` : `${whole.format(ms)} ms`);

export const formatMemory = (bytes) => `${whole.format(bytes / 2 ** 20)} MiB`;

/** A size of what is stored, in the unit that leaves few digits. */
export function formatBytes(bytes) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  const power = bytes < 1024 ? 0 : Math.min(units.length - 1, Math.floor(Math.log2(bytes) / 10));
  return `${formatRate(bytes / 1024 ** power)} ${units[power]}`;
}

export const formatTime = (unixMs) => clock.format(unixMs);

/** A duration in its two largest units. */
export function formatDuration(seconds) {
  const s = Math.max(0, Math.floor(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86_400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86_400)} d ${Math.floor((s % 86_400) / 3600)} h`;
}

export const plural = (number, what) => `${whole.format(number)} ${what}${number === 1 ? "" : "s"}`;
